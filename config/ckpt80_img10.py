# stage 2, the paper's main recipe: the 80 % checkpoint, resumed at its own lr, 10 % image-caption sequences (2.1.2)
name = 'ckpt80_img10'
stage = 'mix'
init_from = 'out/{scale}/text/ckpt_080'
schedule = 'cooldown'
image_ratio = 0.10
seq_len = 1024                          # appendix C
max_tokens = 28_795_904_000             # 20 x 1,439,795,200: the multiplier of 2.1.2, q/k norms not counted
keep_percent = (100,)
keep_optimizer = 'last'
