# the second: up to 980 pixels, on from the first's checkpoint, positions resized once; after config/res384.py
if stage == 'mix':
    init_from = f'out/{{scale}}/{name}/ckpt_100'
    image_size = 980
    schedule, rewarm_lr = 'rewarm', 1e-4    # Idefics2's lr
name = name.replace('_384', '_980')
