# figure 7's control: stage 2 reads one half of the instructions, stage 3 the other (LLaVA JSON, each half of the rows; the
# world of tinyworld.py data --study has them); after the recipe and the scale file
if stage == 'mix':
    name, instruct = f'{name}_halves', 'instruct/half_1.json'
if stage == 'finetune':
    name, instruct = f'{name}_halves', 'instruct/half_2.json'
