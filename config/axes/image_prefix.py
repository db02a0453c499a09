# PrefixLM over the image, the paper's future work; after config/ckpt80_img10.py or config/finetune.py
name, image_mask = f'{name}_image_prefix', 'prefix'
