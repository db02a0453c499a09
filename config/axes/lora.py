# the decoder trains by adapters (LoRA); after config/ckpt80_img10.py or config/finetune.py
name, lora_rank = f'{name}_lora', 8
