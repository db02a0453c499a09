# appendix I, table 4: the encoder is trained with the rest; after config/ckpt80_img10.py or config/finetune.py
name, freeze = f'{name}_trained_encoder', 'none'
