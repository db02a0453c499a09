# the paper's 79M model (appendix A); after a recipe: torchrun pretrain.py config/text.py config/79m.py
scale = '79m'
if stage in ('text', 'mix'):
    n_layer, n_head, n_embd = 8, 4, 512
    micro_batch_size = 32
    lr = 3e-3
    warmup_steps = 400
if stage == 'text':
    global_batch_size = 512
    max_tokens = 237_000_000_000
if stage == 'mix':
    max_tokens = 20 * 78_914_048        # times 2 or 4 for appendix G
