# stage 2 in two resolutions (arXiv 2405.02246), the first: images of up to 384 pixels in their own aspect ratio, 64
# positions each; after config/ckpt80_img10.py and the scale file
name = f'{name}_384'
if stage == 'mix':
    aspect, image_size = 'keep', 384
    projector, image_tokens = 'perceiver', 64
