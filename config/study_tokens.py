# the study with 36 tokens an image instead of 9, a scale of its own, for the grids of connectors and image tokens; after
# config/tiny.py and config/study.py. Its encoder: python tinyworld.py encoder --patch=7
scale = 'tiny_tokens'
if stage in ('mix', 'finetune'):
    encoder_path = '../tiny/encoder_7'
