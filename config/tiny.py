# the tiny world on a 2-core laptop; after a recipe: python pretrain.py config/ckpt80_img10.py config/tiny.py
scale = 'tiny'
if stage != 'study':
    n_thread = 2
if stage == 'evaluate':
    eval_dir = 'data/tiny/eval'
    n_thread = 1                        # its tensors are small: the other core decodes images
    short_suffix = ''                   # its questions are worded alike everywhere
    box_prompt = 'box of the {sent}?'
    pope_words = ('yes', 'no')
    text_variant = 'dclm'
    max_new_tokens = 32
    batch_size = 64
if stage in ('text', 'mix', 'finetune', 'dpo'):
    data_dir = 'data/tiny'
    data_hint = 'the tiny world is made by: python tinyworld.py data && python tinyworld.py encoder'
    n_worker = 0                        # two cores: the loader shares them anyway
    save_every = 200
    log_every = 100
if stage in ('text', 'mix'):
    tokenizer = 'tokenizer.model'
    text = (('text', 0.99), ('english', 0.01))
    val_text = 'text_val'
    val_captions = 'captions_val'
    n_layer, n_head, n_embd, n_ffn = 4, 3, 96, 256
    vocab_size = 832
    seq_len = 96
    global_batch_size = micro_batch_size = 16
    lr = 1.5e-3
    weight_decay = 0.03
    eval_every = 200
    eval_rows = 128
if stage == 'text':
    max_steps = 2000
    warmup_steps = 110
if stage == 'mix':
    max_steps = 240                     # 12 % of stage 1 (the paper's is 0.65 %); the projector starts from nothing
    projector_lr = 1.5e-3
    rewarm_steps = 24
if stage in ('text', 'mix', 'finetune'):
    encoder_path = 'encoder'
if stage in ('mix', 'finetune'):
    image_size = 42                     # the world's own, for every encoder
    instruct = 'instruct/llava.json'
    instruct_images = 'instruct'
if stage == 'finetune':
    seq_len = 128
    global_batch_size = micro_batch_size = 16
    length_window = 0                   # rows are short, and the scores in docs/results.md were made without
    n_epoch = 6                         # boxes are learned last, and at 5 not in every draw
    lr = 1.5e-3
    final_lr = 1e-5
    split_turns = True                  # several questions in a row leak into each other at this size
    loss_average = 'answer'             # boxes are long answers
if stage == 'dpo':
    data_hint = 'the tiny world has them by: python tinyworld.py preferences'
    preferences = 'preferences/preferences.json'
    preference_images = 'preferences'
    seq_len = 128
    global_batch_size = micro_batch_size = 16
    lr = 3e-4
    sft_weight = 1.0                    # without it free answers are lost: docs/options.md
if stage == 'smart101':                 # the puzzles are made by: python tinypuzzles.py
    data_dir = 'data/tiny'
    width, n_query = 64, 8
    dropout = 0.0
    global_batch_size = micro_batch_size = 64
    max_steps = 600                     # of four puzzles: questions about one cell are read after thousands of a kind
    lr = 1e-3                           # at 3e-3 no picture was ever read
    n_worker, save_every, log_every = 0, 0, 100
