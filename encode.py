"""Encodes images into token files, once, so that stage 2 never runs an encoder.

    python encode.py config/charts.py
    torchrun --nproc_per_node=8 encode.py --out_dir=out-tokenizer_256 --crops=10

Reads out_dir/tokenizer.pt. Writes out_dir/tokens/{train,val}.bin and .json. Each row of the uint16 files is
one crop of an image: structure tokens r_1 … r_K, alias tokens a_1 … a_{K−1}, label. To continue an
interrupted run, run the same command again.
"""
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, configure
from data import close_table, fetch, normalize, open_dataset, open_table, undone_batches
from tokenizer import load_tokenizers
from util import runtime
from util.checkpoint import atomic_write, digest, locked, read_json, write_json

# input and output
out_dir = 'out'                 # folder of tokenizer.pt; tokens/ is written there
data = ''                       # images (default: those the tokenizer was trained on)
crops = 1                       # random crops per training image; validation images have one, at the centre
workers = 0                     # processes that decode images
# system
batch_size = 32                 # images per batch; each is encoded once for every radius
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # determines the crops and the noise of Eq. 3
config = configure(globals())

# The label is the last number of a row and is written last. These two values take its place.
NOT_YET, UNREADABLE = 65535, 65534


def encode_split(split, structure, alias, stage1, dev, autocast):
    """Writes the two files of a split."""
    random_crops = split == 'train'
    source, flip = data or stage1['config']['data'], stage1['config'].get('flip', False)
    dataset = open_dataset(source, split, structure.image_size, flip=flip, seed=seed)
    per_image, count = crops if random_crops else 1, len(dataset)
    columns = sum(p * p for p in structure.patch_nums + alias.patch_nums) + 1
    meta = {
        'rows': count * per_image, 'columns': columns, 'classes': dataset.classes,
        'patch_nums': list(structure.patch_nums), 'alias_patch_nums': list(alias.patch_nums),
        'vocab_size': structure.quantizer.codebook.num_embeddings, 'alias_vocab_size': alias.vocab_size,
        'data': source, 'contents': dataset.contents, 'crops': per_image, 'flip': flip, 'seed': seed,
        'batch_size': batch_size, 'dtype': str(runtime.dtype_of(autocast)),
        'tokenizer': digest(structure.state_dict()), 'alias_tokenizer': digest(alias.state_dict())}
    if max(meta['vocab_size'], meta['alias_vocab_size'], len(dataset.classes)) > UNREADABLE:
        raise UserError('token files hold 16-bit numbers: at most 65534 codes and classes')

    final = Path(out_dir, 'tokens', f'{split}.bin')
    description, partial = final.with_suffix('.json'), final.with_suffix('.partial')
    written = read_json(description) or {}
    if written | {'rows': meta['rows']} == meta and final.is_file():       # it may have fewer rows
        runtime.say(f'{final} already exists with identical settings; delete it to encode again')
        return
    table = open_table(partial, meta, meta['rows'], columns, np.uint16, NOT_YET)
    undone = undone_batches(table, batch_size, NOT_YET)
    keys = [[(row % count, row) if random_crops else row for row in batch] for batch in undone]
    bar = runtime.progress(len(undone), label=f'encode {split}',
                           images_per_step=batch_size * runtime.world_size())
    for batch, (images, labels) in zip(undone, fetch(dataset, keys, workers)):
        images = normalize(runtime.to_device(images, dev)).contiguous(memory_format=torch.channels_last)
        noise = runtime.noise_of(batch, dev, seed, split)
        with autocast():
            maps = structure.encode(images, noise) + alias.encode(images, noise)
        labels[dataset.skipped[[row % count for row in batch]]] = UNREADABLE
        tokens = torch.cat([*maps, runtime.to_device(labels[:, None], dev)], 1)
        table[batch.start:batch.stop] = tokens.cpu().numpy()
        bar.update()
    bar.close()
    table.flush()
    runtime.barrier()

    if runtime.rank() == 0:
        description.unlink(missing_ok=True)                 # before the tokens that it describes are replaced
        kept = np.flatnonzero(table[:, -1] != UNREADABLE)
        if len(kept) == len(table):
            partial.replace(final)
        else:                                               # atomically: a kill cannot leave half a file
            with atomic_write(final) as file:
                for row in kept:
                    file.write(table[row])
        write_json(description, meta | {'rows': len(kept)})
        close_table(partial)
        runtime.say(f'wrote {final}: {len(kept)} × {columns} tokens, {final.stat().st_size / 1e6:.1f} MB')
        if len(kept) < len(table):
            runtime.say(f'left out {len(table) - len(kept)} rows whose images cannot be read')
    runtime.barrier()


def main():
    dev = runtime.start(device, seed)
    runtime.require_positive(config, 'crops', 'batch_size')
    autocast, _ = runtime.precision(dtype, dev)
    structure, alias, stage1 = load_tokenizers(f'{out_dir}/tokenizer.pt', dev)
    with locked(f'{out_dir}/tokens/encode.lock'):
        for split in ('train', 'val'):
            encode_split(split, structure, alias, stage1, dev, autocast)


if __name__ == '__main__':
    runtime.run(main)
