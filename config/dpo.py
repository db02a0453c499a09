# preference training after stage 3: one pass of DPO over LLaVA-RLHF's 9,422 human preferences (arXiv 2305.18290)
name = 'dpo'
init_from = 'out/{scale}/finetune/ckpt_100'
n_epoch = 1
