# the 7B model (appendices A, H; DCLM's records); after a recipe: torchrun pretrain.py config/text.py config/7b.py
scale = '7b'
if stage in ('text', 'mix', 'finetune', 'dpo'):
    parallel = 'fsdp'                   # weights, gradients and moments: 110 GB in float32
    activation_checkpointing = True
    micro_batch_size = 2 if stage == 'dpo' else 4
if stage in ('text', 'mix'):
    n_layer, n_head, n_embd = 32, 32, 4096
    lr, final_lr = 2e-3, 3e-5
    warmup_steps = 10000
    weight_decay, z_loss = 0.05, 5e-6
if stage == 'text':
    global_batch_size = 2048
    keep_percent = (20, 40, 50, 60, 80, 100)
if stage == 'mix':
    max_tokens = 140_000_000_000        # table 3; its first model starts at 50 %: config/axes/ckpt50.py
