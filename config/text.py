# stage 1: text-only pre-training, checkpoints at 20 ... 100 % (paper 2.1.1, appendix A); add a scale file after it
name = 'text'
