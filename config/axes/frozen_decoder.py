# the decoder stays as it is; after config/ckpt80_img10.py or config/finetune.py
name, freeze = f'{name}_frozen', 'both'
