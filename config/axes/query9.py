# a perceiver of 9 tokens an image; after config/ckpt80_img10.py
name, token_mode, image_tokens = f'{name}_query9', 'query', 9
