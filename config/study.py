# the study on the tiny world; after config/tiny.py: python study.py fig4 config/tiny.py config/study.py
if stage == 'study':
    seeds = (7, 365, 1)
    n_order = 2
    reference_ratio = '30 %'
    n_job = 2
    vision_tasks = (('vqav2/at', 0.067), ('pope', 0.5), ('refcoco', 0.009), ('vqav2_facts/new', 0.125))
    text_tasks = (('reading', 0.25), ('facts', 0.25))
    vision_example, text_example = 'vqav2_facts/new', 'reading'
    apart_tasks = ('vqav2', 'textvqa', 'vqav2_facts/known')
    along = (80, 160)
    blind_caption_loss = 1.30           # tinyworld.blind_caption_loss()
else:
    n_thread = 1
if stage == 'evaluate':
    eval_dir = 'data/study/eval'
if stage in ('text', 'mix', 'finetune'):
    data_dir = 'data/study'
    data_hint = "the study's world is made by: python tinyworld.py data --study && python tinyworld.py encoder"
if stage in ('mix', 'finetune'):
    encoder_path = '../tiny/encoder'    # the same scenes, the same encoder
if stage == 'mix':
    max_steps = 1300                    # 6,240 images at 30 %: enough to learn what a caption says
if stage == 'finetune':
    n_epoch = 4                         # of 1,000 conversations: 250 steps
    lr = 5e-4                           # a third of stage 1's peak
