# the tiny world on a 2-core laptop; after a recipe: python pretrain.py config/ckpt80_img10.py config/tiny.py
scale = 'tiny'
n_thread = 2
if stage != 'evaluate':
    data_dir = 'data/tiny'
    data_hint = 'make the tiny world with: python tinyworld.py data && python tinyworld.py encoder'
    encoder_path = 'encoder'
    n_worker = 0                        # two cores: the loader shares them anyway
    log_every = 50
    save_every = 200
if stage in ('text', 'mix'):
    tokenizer = 'tokenizer.model'
    text = (('text/*.tar', 0.95), ('english/*.bin', 0.05))
    n_layer, n_head, n_embd = 4, 4, 128
    vocab_size = 832
    n_ffn = 384
    seq_len = 96
    global_batch_size = micro_batch_size = 16
    lr = 1.5e-3
    weight_decay = 0.03
if stage == 'text':
    max_steps = 1400
    warmup_steps = 70
if stage == 'mix':
    max_steps = 200
if stage == 'finetune':
    seq_len = 256
    instruct = 'instruct/llava.json'
    instruct_images = 'instruct'
    global_batch_size = micro_batch_size = 32
    max_steps = 900
    lr = 1.5e-3
    final_lr = 1e-5
    split_turns = True
    loss_average = 'answer'
if stage == 'evaluate':
    eval_dir = 'data/tiny/eval'
    short_suffix = ''
    box_prompt = 'box of the {sent}?'
    pope_words = ('yes', 'no')
    max_new_tokens = 32
