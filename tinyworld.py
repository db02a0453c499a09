"""
The embedded tiny world: scenes of coloured shapes and words, in the formats of the real data sets, and their SigLIP.
    python tinyworld.py data --out=data/tiny                 # text, captions, instructions, benchmarks
    python tinyworld.py data --study --out=data/study        # the same with facts about what scenes show, told in text
    python tinyworld.py encoder --out=data/tiny/encoder      # a 3-layer SigLIP in Hugging Face layout
    python tinyworld.py preferences                          # pairs of answers for dpo.py, in data/tiny/preferences
    python tinyworld.py crowded --out=data/tiny/crowded      # questions about one of eight objects

What a scene is stands in tinyscenes.py. HELD_OUT pairs are in the text but in no training image. All bytes follow from
the seed and the Python version (the English text is Python's documentation).
"""
import argparse
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
import zlib
from pydoc_data.topics import topics

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

from errors import user_error_hook
from files import write_file, writing
from schedules import main_lr
from shards import new_folder, write_tar
from tinyscenes import (CELL, CELLS, COLOURS, GRID, HELD_OUT, KINDS, KNOWN, LOOKUPS, NEW, PAIRS, SEEN, SHAPES, SIZE,
                        WORDS, Draws, ask, distinct, encode_image, facts, field_order, listing, make_scene, relisting,
                        render, scene_document)
from vision import SigLIP, SigLIPConfig, siglip_loss
from weights import read_json

VERSION = 2                                 # of the files; captions/ came with 2


# --- files ----------------------------------------------------------------------------------------------------------
def train_tokenizer(path, documents, vocab_size):
    """
    Train sentencepiece BPE on one thread; each coordinate of a box is one piece. Its other model, unigram, would cut
    these words into small pieces.
    """
    edges = [cell * CELL + offset for cell in range(GRID) for offset in (1, 2, 3, 11, 12, 13)]
    numbers = [f'{space}{round(edge / SIZE, 2):.2f}{comma}'
               for edge in edges for space in ('', '\u2581') for comma in ('', ',')]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=(model := io.BytesIO()), model_type='bpe', num_threads=1,
        vocab_size=vocab_size, split_by_number=False, byte_fallback=True, character_coverage=1.0, minloglevel=2,
        normalization_rule_name='identity', remove_extra_whitespaces=False, max_sentence_length=1 << 20,
        user_defined_symbols=numbers)
    write_file(path, model.getvalue())


def write_text(folder, tokenizer, n_row, row_len, seed, split='train', study=False, scene_share=0.92, shard=4096):
    """OpenLM shards of rows of row_len + 1 ids: in `scene_share` of the rows first a scene document, then facts."""
    draw, fact_ids = Draws(*seed), [tokenizer.encode(f'{text} {answer} .') for text, answer, _ in facts(study)]
    for start in range(0, n_row, shard):
        members = []
        for row in range(start, min(start + shard, n_row)):
            ids = []
            if draw.uniform() < scene_share:
                ids = tokenizer.encode(scene_document(draw, split, study)) + [tokenizer.eot_id]
            while len(ids) <= row_len:
                ids += draw.pick(fact_ids)
            data = zlib.compress(json.dumps(ids[:row_len + 1]).encode(), 1, wbits=31)      # gzip without a time stamp
            members.append((f'{row:08d}.json.gz', data))
        write_tar(f'{folder}/{start // shard:05d}.tar', members)


def write_captions(folder, n, split, seed, study=False, shard=1000):
    """
    WebDataset shards: an image, its caption as .txt and .json; the caption is the listing that the text uses, in the
    study's world one of its relistings.
    """
    draw = Draws(*seed)
    for start in range(0, n, shard):
        scenes, members = [make_scene(draw, split) for _ in range(start, min(start + shard, n))], []
        for i, (scene, pixels) in enumerate(zip(scenes, render(scenes)), start):
            kind, caption = 'png' if i % 4 == 3 else 'jpg', listing(scene.things)
            if study:
                caption = relisting(draw.sample(scene.things), field_order(draw))
            members += [(f'{i:08d}.{kind}', encode_image(pixels, kind)), (f'{i:08d}.txt', caption.encode()),
                        (f'{i:08d}.json', json.dumps(dict(key=f'{i:08d}', caption=caption)).encode())]
        write_tar(f'{folder}/{start // shard:05d}.tar', members)


def blind_caption_loss():
    """
    Nats a token of the study's captions, their end included, of a guesser who knows how captions are made but does not
    see the image: the entropy of write_captions' draws, from which the caption follows and which follow from it. Left
    out is what a guesser could gain from computing checksums: 0.013 nats a token for training captions, 0.14 for those
    of 'choice'.
    """
    ways = lambda n, k: sum(math.log(n - i) for i in range(k))              # of k out of n in order, each as probable
    nats = n_token = 0.0
    for n, word in itertools.product((3, 4), (0, 1)):                       # objects, words: four cases alike
        nats += (ways(len(SEEN), n) + ways(len(CELLS), n + word) + word * math.log(len(WORDS) * (n + 1))) / 4
        n_token += (4 * (n + word) + 1) / 4                                 # cell, two names, '.'; the end of text
    orders = [0.5 + 0.35 / 6, 0.15 + 0.35 / 6] + 4 * [0.35 / 6]             # of fields: see field_order
    return (nats + math.log(4) - sum(p * math.log(p) for p in orders)) / n_token


def write_instruct(folder, n, seed, study=False, n_question=6):
    """
    LLaVA JSON and its images: conversations of distinct short questions, one row in 20 about text alone. In the study's
    world one more question about a fact, and two files more, halves of the first (figure 7's control).
    """
    draw, rows = Draws(*seed), []
    scenes = [make_scene(draw, 'train', word=True if i % 4 else None) for i in range(n)]
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes))):
        row, text_only = dict(id=f'{i:06d}'), i % 20 == 19
        if text_only:
            scene = make_scene(draw, 'train', pairs=PAIRS)
        else:
            row['image'] = f"images/{i:06d}.{'png' if i % 4 == 3 else 'jpg'}"
            write_file(f"{folder}/{row['image']}", encode_image(pixels, row['image'][-3:]))
        asked = distinct(['read', 'box', 'box'] + draw.sample(KINDS), 3 if text_only else n_question, scene, draw,
                         nominal=text_only)
        asked = draw.sample(asked + (distinct(['fact'], 1, scene, draw, about=KNOWN) if study else []))
        row['conversations'] = []
        for k, (question, answer) in enumerate(asked):
            opening = '' if k else listing(scene.things) + ' ' if text_only else '<image>\n'
            row['conversations'] += [{'from': 'human', 'value': opening + question}, {'from': 'gpt', 'value': answer}]
        rows.append(row)
    parts = dict(llava=rows, **(dict(half_1=rows[:n // 2], half_2=rows[n // 2:]) if study else {}))
    for name, part in parts.items():
        write_file(f'{folder}/{name}.json', json.dumps(part, indent=1))


def write_preferences(folder, n=2000, seed=(7, 9)):
    """
    LLaVA-RLHF's JSON of preferences, and its images: what is true of a scene is preferred to what is not in it. Half of
    the questions are POPE's, as often yes as no; the others ask what is in a cell.
    """
    draw, rows = Draws(*seed), []
    scenes = [make_scene(draw, 'train') for _ in range(n)]
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes))):
        kind, want = ('presence', 'at')[i % 2], ('yes', 'no', 'yes', 'binding')[i // 2 % 4]
        question, better, _ = ask(kind, scene, draw, want=want)
        there = {(thing.colour, thing.shape) for thing in scene.objects}
        wrong = {'yes': ['no'], 'no': ['yes']}.get(better) or [' '.join(pair) for pair in SEEN if pair not in there]
        outputs = draw.sample([better, draw.pick(wrong)])
        rows.append(dict(
            id=f'{i:06d}', image=f'images/{i:06d}.jpg', preference=1 + outputs.index(better), hallucination=True,
            conversations=[{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': ''}],
            **{f'output_{k}': {'from': 'llava', 'value': text} for k, text in enumerate(outputs, 1)}))
        write_file(f"{folder}/{rows[-1]['image']}", encode_image(pixels, 'jpg'))
    write_file(f'{folder}/preferences.json', json.dumps(rows, indent=1))


def write_crowded(folder, n, n_test, seed):
    """
    Scenes of eight objects, and questions about one of them: text_cond's to win or to lose. LLaVA JSON and images in
    instruct/, VQAv2's files in eval/.
    """
    draw, rows = Draws(*seed), []
    for split, path, number in (('train', 'instruct/{:06d}.jpg', n),
                                ('test', 'eval/val2014/COCO_val2014_{:012d}.jpg', n_test)):
        scenes = [make_scene(draw, split, word=False, n_object=8) for _ in range(number)]
        for i, pixels in enumerate(render(scenes)):
            write_file(f'{folder}/{path.format(i)}', encode_image(pixels, 'jpg'))
        if split == 'test':
            write_vqa(f'{folder}/eval/vqav2', [(i * 1000 + k, kind, ask(kind, scene, draw)) for i, scene in
                                               enumerate(scenes) for k, kind in enumerate(('at', 'where'))])
        for i, scene in enumerate(scenes) if split == 'train' else ():
            turns = itertools.chain(*distinct(('at', 'where') * 3, 4, scene, draw))
            rows.append(dict(id=f'{i:06d}', image=f'{i:06d}.jpg', conversations=[
                {'from': speaker, 'value': text} for speaker, text in zip(itertools.cycle(('human', 'gpt')), turns)]))
    write_file(f'{folder}/instruct/llava.json', rows)


# --- benchmarks: official files; question_type and blind_answers are extra keys that evaluate.py reports ------------
def ask_all(scenes, draw, about=None, per_scene=3):
    """Questions about scenes, as many of each kind: [(id, kind, what ask() gave)]; id // 1000 is the scene's number."""
    pairs = PAIRS if about else SEEN
    return [(i * 1000 + k, kind, ask(kind, scene, draw, pairs=pairs, about=about)) for i, scene in enumerate(scenes)
            for k, kind in enumerate(KINDS[(i + 2 * k) % len(KINDS)] for k in range(per_scene))]


def ask_facts(scenes, draw):
    """What only the text says of what the image shows: about KNOWN pairs, as in instructions, and about NEW ones."""
    return [(i * 1000 + k, kind, ask('fact', scene, draw, about=about)) for i, scene in enumerate(scenes)
            for k, (kind, about) in enumerate((('known', KNOWN), ('new', NEW)))]


def write_vqa(folder, asked):
    """VQAv2's two files of [(id, kind, what ask() gave)]; ten annotators agree on an answer."""
    questions, annotations = [], []
    for i, kind, (question, answer, blind) in (row for row in asked if row[2]):
        ids = dict(image_id=i // 1000, question_id=i)
        questions.append(dict(ids, question=question))
        annotations.append(dict(
            ids, question_type=kind, answer_type={'presence': 'yes/no', 'count': 'number'}.get(kind, 'other'),
            multiple_choice_answer=answer, blind_answers=blind,
            answers=[dict(answer=answer, answer_confidence='yes', answer_id=j + 1) for j in range(10)]))
    common = dict(task_type='Open-Ended', data_type='mscoco', data_subtype='val2014', license={}, info={})
    write_file(f'{folder}/v2_OpenEnded_mscoco_val2014_questions.json', dict(common, questions=questions))
    write_file(f'{folder}/v2_mscoco_val2014_annotations.json', dict(common, annotations=annotations))


def write_pope(folder, scenes, draw):
    """POPE's three JSON-lines files, half of each 'yes'; absent objects share one attribute with the scene, or both."""
    for split, binding in (('random', 0.0), ('popular', 0.5), ('adversarial', 1.0)):    # share of 'both'
        lines = []
        for i, scene in enumerate(scenes):
            for want in ('yes', 'binding' if draw.uniform() < binding else 'no'):
                question, label, blind = ask('presence', scene, draw, want=want)
                lines.append(dict(question_id=len(lines) + 1, image=f'COCO_val2014_{i:012d}.jpg', text=question,
                                  label=label, blind_answers=blind))
        write_file(f'{folder}/coco_pope_{split}.json', lines)


def write_textvqa(folder, scenes, draw):
    """TextVQA's file: which word is in the image?"""
    rows = [dict(question_id=i, image_id=f'{i:016x}', question=question, answers=[answer] * 10, set_name='val',
                 image_width=SIZE, image_height=SIZE, blind_answers=blind)
            for i, (question, answer, blind) in enumerate(ask('read', scene, draw) for scene in scenes)]
    write_file(f'{folder}/TextVQA_0.5.1_val.json', dict(dataset_type='val', dataset_name='textvqa', data=rows))


def write_refcoco(folder, scenes, draw):
    """RefCOCO's instances.json and refs(unc).p (plain lists and dicts): one expression a scene, 'red star'."""
    images, annotations, refs = [], [], []
    for i, scene in enumerate(scenes):
        images.append(dict(id=i, file_name=f'COCO_train2014_{i:012d}.jpg', width=SIZE, height=SIZE))
        about = draw.below(len(scene.objects))
        for k, thing in enumerate(scene.objects):
            ids, (x, y, _, _) = dict(image_id=i, category_id=SHAPES.index(thing.shape) + 1), thing.box
            box = [x, y, thing.size, thing.size]
            annotations.append(dict(ids, id=i * 10 + k, bbox=box, area=thing.size ** 2, iscrowd=0))
            if k == about:
                sentence = dict(sent_id=i, sent=thing.name, raw=thing.name, tokens=thing.name.split())
                refs.append(dict(ids, ref_id=i, ann_id=i * 10 + k, split='val', sent_ids=[i], sentences=[sentence],
                                 file_name=f'COCO_train2014_{i:012d}_{i}.jpg'))
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(SHAPES, 1)]
    write_file(f'{folder}/instances.json', dict(info={}, images=images, annotations=annotations, categories=categories))
    write_file(f'{folder}/refs(unc).p', pickle.dumps(refs, protocol=2))


def write_caption_lines(folder, scenes, study):
    """captions.jsonl: the captions that VQAv2's images may have, for a model of stage 2, which answers no questions."""
    orders = list(itertools.permutations(range(3)))[:None if study else 1]  # the first is the listing's own
    write_file(f'{folder}/captions.jsonl', [
        dict(image=f'COCO_val2014_{i:012d}.jpg', caption=relisting(scene.things, order))
        for i, scene in enumerate(scenes) for order in orders])


def write_text_choices(folder, split, n, draw, study):
    """Four choices: reading.jsonl on listings of unseen scenes, facts.jsonl, a quarter of the facts for 'choice'."""
    pools, lines = dict(colour=tuple(COLOURS), shape=SHAPES, where=CELLS, at=tuple(map(' '.join, PAIRS))), []
    while len(lines) < n:
        scene, kind = make_scene(draw, split, pairs=PAIRS), LOOKUPS[len(lines) % 4]
        got = ask(kind, scene, draw, pairs=PAIRS)
        if got and got[1] in pools[kind]:
            named = [answer for answer in got[2] if answer in pools[kind] and answer != got[1]]     # in the same scene
            others = [answer for answer in pools[kind] if answer not in got[2]]
            choices = draw.sample([got[1]] + (draw.sample(named) + draw.sample(others))[:3])
            lines.append(dict(query=f'{listing(scene.things)} {got[0]}', choices=choices, gold=choices.index(got[1]),
                              question_type=kind, blind_answers=[choice for choice in choices if choice in got[2]]))
    write_file(f'{folder}/reading.jsonl', lines)
    lines = []
    for i, (text, gold, answers) in enumerate(facts(study)):
        if (i % 4 == 0) == (split == 'choice'):
            choices = draw.sample([gold] + draw.sample([answer for answer in answers if answer != gold], 3))
            lines.append(dict(query=text, choices=choices, gold=choices.index(gold)))
    write_file(f'{folder}/facts.jsonl', lines)


def write_benchmarks(folder, split, n, seed, study=False):
    """The benchmark folders of one split, about n images each; held-out pairs only in vqav2_heldout."""
    draw = Draws(*seed)
    scenes, boxed, worded, held_out = ([make_scene(draw, split, **options) for _ in range(n)]
                                       for options in ({}, {}, dict(word=True), dict(held_out=1)))
    coco = 'val2014/COCO_val2014_{:012d}.jpg'                               # VQAv2 and POPE share a folder
    paths = coco, f'vqav2_heldout/{coco}', f"refcoco/{coco.replace('val', 'train')}", 'textvqa/train_images/{:016x}.jpg'
    for path, group in zip(paths, (scenes, held_out, boxed, worded)):
        for i, pixels in enumerate(render(group)):
            write_file(f'{folder}/{path.format(i)}', encode_image(pixels, 'jpg'))
    write_caption_lines(f'{folder}/captions', scenes, study)
    write_vqa(f'{folder}/vqav2', ask_all(scenes, draw))
    if study:
        write_vqa(f'{folder}/vqav2_facts', ask_facts(scenes, draw))
    write_vqa(f'{folder}/vqav2_heldout', ask_all(held_out, draw, about=HELD_OUT, per_scene=1))
    write_pope(f'{folder}/pope', scenes[:n // 2], draw)
    write_textvqa(f'{folder}/textvqa', worded, draw)
    write_refcoco(f'{folder}/refcoco', boxed, draw)
    write_text_choices(f'{folder}/text', split, n, draw, study)


def write_data(out, *, study=False, n_row=45_000, row_len=96, n_caption=7000, n_instruct=0, n_test=400, n_topic=100,
               vocab_size=768, seed=7):
    """
    Write the world into the folder `out`, whole or not at all; does nothing when it is there. Raises UserError when
    `out` holds anything else than the world of these settings.
    """
    from data import load_tokenizer                                         # here: the encoder needs no text
    n_instruct = n_instruct or (1000 if study else 4000)            # the study's: fixed on its calibration seeds
    settings = dict(version=VERSION, n_row=n_row, row_len=row_len, n_caption=n_caption, n_instruct=n_instruct,
                    n_test=n_test, n_topic=n_topic, vocab_size=vocab_size, seed=seed, python=sys.version.split()[0],
                    **({'study': True} if study else {}))
    if os.path.exists(f'{out}/world.json') and read_json(f'{out}/world.json') == settings:
        return print(f'{out}: already there')
    start = time.time()
    texts, draw = [topics[name] for name in sorted(topics)][:n_topic], Draws(seed, 0)     # English about Python
    sample = [scene_document(draw, study=study) for _ in range(3000)]
    sample += 60 * [f'{text} {answer} .' for text, answer, _ in facts(study)]
    sample += [line for text in texts for line in text[:2000].split('\n')][:5000]
    with new_folder(out) as part:
        train_tokenizer(f'{part}/tokenizer.model', sample, vocab_size)
        tokenizer = load_tokenizer(f'{part}/tokenizer.model')
        write_text(f'{part}/text', tokenizer, n_row, row_len, seed=(seed, 1), study=study)
        write_text(f'{part}/text_val', tokenizer, 256, row_len, seed=(seed, 2), split='choice', study=study)
        ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eot_id)]
        write_file(f'{part}/english/00000.bin', np.array(ids, '<u2').tobytes())
        write_captions(f'{part}/captions', n_caption, 'train', seed=(seed, 3), study=study)
        write_captions(f'{part}/captions_val', 256, 'choice', seed=(seed, 4), study=study)
        write_instruct(f'{part}/instruct', n_instruct, seed=(seed, 5), study=study)
        write_benchmarks(f'{part}/eval', 'test', n_test, seed=(seed, 6), study=study)
        write_benchmarks(f'{part}/eval_choice', 'choice', n_test // 2, seed=(seed, 7), study=study)
        write_file(f'{part}/world.json', settings)
    print(f'{out}: {n_row} rows of text, {n_caption} captions, {n_instruct} conversations, {time.time() - start:.0f} s')


# --- encoder --------------------------------------------------------------------------------------------------------
NAMES = (*PAIRS, *(('word', word) for word in WORDS), ('nothing', ''))      # all that a cell can show


def phrases():
    """The word ids (cells, names, 3) int64 of all phrases, 'red star b2', by cell and name; the last is the highest."""
    words = sorted({word for name in NAMES for word in name}) + list(CELLS)
    return torch.tensor([[[words.index(word) for word in (*name, cell)] for name in NAMES] for cell in CELLS])


def encoder_batch(draw, n, split='train', held_out=0):
    """Images (n, 3, SIZE, SIZE) uint8, a word in each, and which of NAMES each cell shows, (n, cells) int64."""
    scenes = [make_scene(draw, split, held_out=held_out, word=True) for _ in range(n)]
    shown = torch.full((n, len(CELLS)), len(NAMES) - 1)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            shown[i, thing.cell] = NAMES.index((thing.colour, thing.shape))
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).contiguous(), shown


def train_encoder(out, *, patch=CELL, n_step=500, batch_size=48, n_cell=8, lr=3e-3, width=96, seed=7, n_thread=2):
    """
    Pre-train a SigLIP of 3 blocks (arXiv 2303.15343) and write it into the folder `out`.
    Two sigmoid losses are added. The first compares each patch after block 2, which is what a VLM uses, with the phrase
    of what it shows and where ('a red star at b2', 'nothing at c3'): n_cell cells in a step, each with all its phrases.
    Where a cell is several patches, their mean counts.
    The second is SigLIP's own: the mean patch after block 3 and the final norm, with the image's caption. Returns the
    SigLIP and the table of the words' vectors.
    """
    torch.set_num_threads(n_thread)
    torch.manual_seed(seed)
    start, draw = time.time(), Draws(seed, 8)
    config = SigLIPConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, patch_size=patch,
                          num_attention_heads=width // 32, image_size=SIZE)
    ids, encoder = phrases(), SigLIP(config, layer=-2, keep_all=True)
    table = torch.nn.Embedding(int(ids.max()) + 1, width)
    scales = torch.nn.Parameter(torch.tensor([[math.log(10.0), -10.0]] * 2))        # log t and b of both losses
    parameters = [*encoder.parameters(), *table.parameters(), scales]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4)
    seen = torch.tensor([i for i, name in enumerate(NAMES) if name not in HELD_OUT])
    column = torch.full((len(NAMES),), -1).scatter(0, seen, torch.arange(len(seen)))
    for step in range(n_step):
        optimizer.param_groups[0]['lr'] = main_lr(step, peak=lr, final=0.0, warmup=n_step // 20, total=n_step)
        images, shown = encoder_batch(draw, batch_size)
        x, vectors = encoder(images), table(ids[:, seen]).sum(2)            # (B, patches, C), (cells, K, C)
        part = x.unflatten(1, 2 * (GRID, CELL // patch)).mean((2, 4)).flatten(1, 2)       # (B, cells, C)
        cells = torch.tensor(draw.sample(range(len(CELLS)), n_cell))
        target = torch.arange(n_cell) * len(seen) + column[shown[:, cells]]       # (B, n_cell)
        labels = torch.full((target.numel(), n_cell * len(seen)), -1.0).scatter_(1, target.flatten()[:, None], 1.0)
        region = siglip_loss(part[:, cells].flatten(0, 1), vectors[cells].flatten(0, 1), *scales[0], labels)
        # not by an index, whose backward adds in an order that changes from run to run on two threads
        named = F.embedding(torch.arange(len(CELLS)) * len(seen) + column[shown], vectors.flatten(0, 1))
        captions = (named * (shown < len(NAMES) - 1)[..., None]).sum(1)     # (B, C)
        pooled = encoder.post_layernorm(encoder.encoder['layers'][2](x)).mean(1)    # (B, C), as are the captions
        length = (x.norm(dim=-1) / width ** 0.5 - 1).square().mean()        # keeps features near sqrt(width) long
        loss = region + 0.1 * siglip_loss(pooled, captions, *scales[1]) + length
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f'step {step + 1}/{n_step} loss {loss.item():.3f} ({time.time() - start:.0f} s)', flush=True)
    encoder.save_pretrained(out)
    return encoder.eval(), table


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('data', 'encoder', 'preferences', 'crowded'))
    parser.add_argument('--out', default='', help="folder to make; '' = data/tiny (data/study), or its COMMAND")
    parser.add_argument('--study', action='store_true', help='data: the world of the study')
    parser.add_argument('--patch', type=int, choices=(CELL, CELL // 2), default=CELL, help='encoder: pixels a side')
    parser.add_argument('--seed', type=int, default=7)
    args = parser.parse_args()
    sys.excepthook = user_error_hook
    world = 'data/study' if args.study else 'data/tiny'
    name = args.command if args.patch == CELL else f'encoder_{args.patch}'
    out = args.out or (world if args.command == 'data' else f'data/tiny/{name}')
    with writing(out):
        if args.command == 'data':
            write_data(out, study=args.study, seed=args.seed)
        else:
            with new_folder(out) as part:
                if args.command == 'encoder':
                    train_encoder(part, patch=args.patch, seed=args.seed)
                elif args.command == 'preferences':
                    write_preferences(part, seed=(args.seed, 9))
                else:
                    write_crowded(part, 2000, 400, seed=(args.seed, 9))
