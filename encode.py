"""Images → token files, once, so that stage 2 never runs a tokenizer's encoder.

    python encode.py config/charts.py
    torchrun --nproc_per_node=8 encode.py --out_dir=out-tokenizer_256 --crops=10

Reads out_dir/tokenizer.pt; writes out_dir/tokens/{train,val}.bin and .json. A row of the uint16 file is one crop of
one image: structure tokens r_1 … r_K, alias tokens a_1 … a_{K−1}, label. An interrupted run goes on where it stopped
when the same command is given again.
"""
import os
from pathlib import Path

import numpy as np
import torch

from util import runtime
from util.checkpoint import atomic_write, digest, read_json, write_json
from configurator import UserError, configure
from data import close_table, fetch, normalize, open_dataset, open_table, undone_batches
from tokenizer import load_tokenizers

# input and output
out_dir = 'out'                 # where tokenizer.pt lies and tokens/ goes
data = ''                       # images (default: what the tokenizer was trained on)
crops = 1                       # random crops a training image; validation has one, the centre
workers = 0                     # processes that decode images
# system
batch_size = 32                 # images at a time, each encoded once for every radius
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # of the crops, and of the noise of Eq. 3
config = configure(globals())

# The label is the last number of a row and is written last; these two stand there instead of one.
NOT_YET, UNREADABLE = 65535, 65534


class Rows(torch.utils.data.Dataset):
    """Row → (image, label) of a data set: row = crop · len(dataset) + index; an unreadable file has label UNREADABLE."""

    def __init__(self, dataset, random_crops):
        self.dataset, self.random_crops = dataset, random_crops

    def __getitem__(self, row):
        index = row % len(self.dataset)
        image, label = self.dataset[(index, row) if self.random_crops else index]
        return image, UNREADABLE if index in self.dataset.skipped else label


def finish(partial, table, final):
    """Gives the table its final name, without the rows of unreadable images; returns how many rows are left."""
    good = np.flatnonzero(table[:, -1] != UNREADABLE)
    if len(good) == len(table):
        os.replace(partial, final)
    else:                                                   # a copy: a kill while rows move up would leave some twice
        with atomic_write(final) as file:
            for first in range(0, len(good), 4096):
                file.write(table[good[first:first + 4096]].tobytes())
    return len(good)


def is_there(final, meta):
    """Whether an earlier run, stopped in the other split, has made the whole file."""
    description = final.with_suffix('.json')
    size = meta['rows'] * meta['columns'] * 2
    return read_json(description) == meta and final.is_file() and final.stat().st_size == size


def encode_split(split, structure, alias, stage1, dev, autocast):
    flip = stage1['config'].get('flip', False)
    dataset = open_dataset(data or stage1['config']['data'], split, structure.image_size, augment=split == 'train', flip=flip,
                           seed=seed)
    per_image = crops if split == 'train' else 1
    lengths = [p * p for p in structure.patch_nums]
    rows, columns = len(dataset) * per_image, sum(lengths) + sum(lengths[:-1]) + 1
    meta = {'rows': rows, 'columns': columns, 'patch_nums': list(structure.patch_nums),
            'alias_patch_nums': list(alias.patch_nums), 'vocab_size': structure.quantizer.codebook.num_embeddings,
            'alias_vocab_size': alias.vocab_size, 'classes': dataset.classes, 'data': data or stage1['config']['data'],
            'crops': per_image, 'flip': flip, 'seed': seed, 'batch_size': batch_size, 'tokenizer': digest(structure.state_dict()),
            'alias_tokenizer': digest(alias.state_dict())}
    if max(meta['vocab_size'], meta['alias_vocab_size'], len(dataset.classes)) > UNREADABLE:
        raise UserError('token files hold 16-bit numbers: at most 65534 codes and classes')

    final = Path(out_dir, 'tokens', f'{split}.bin')
    if is_there(final, meta):
        runtime.say(f'{final} is there already, made of the same; remove it to make it again')
        return
    partial = final.with_suffix('.partial')
    table = open_table(partial, meta, rows, columns, np.uint16, NOT_YET)
    undone = undone_batches(table, batch_size, NOT_YET)
    supply = fetch(Rows(dataset, random_crops=split == 'train'), undone, workers)
    bar = runtime.progress(len(undone), label=f'encode {split}', images_per_step=batch_size * runtime.world_size())
    for batch, (images, labels) in zip(undone, supply):
        images = normalize(runtime.to_device(images, dev)).contiguous(memory_format=torch.channels_last)
        noise = runtime.noise_of(batch, dev, seed, split == 'train')
        with autocast():
            maps = structure.encode(images, noise) + alias.encode(images, noise)
        table[batch.start:batch.stop] = torch.cat([*maps, runtime.to_device(labels[:, None], dev)], 1).cpu().numpy()
        bar.update()
    bar.close()
    table.flush()
    runtime.barrier()

    if runtime.rank() == 0:
        final.with_suffix('.json').unlink(missing_ok=True)   # the old pair goes before the new one comes
        kept = finish(partial, table, final)
        if kept < rows:
            runtime.say(f'warning: {rows - kept} of {rows} rows of {split} left out: their images can not be read')
        write_json(final.with_suffix('.json'), meta | {'rows': kept})
        close_table(partial)
        runtime.say(f'wrote {final}: {kept} × {columns} tokens, {final.stat().st_size / 1e6:.1f} MB')
    runtime.barrier()


def main():
    dev = runtime.start(device, seed)
    autocast, _ = runtime.precision(dtype, dev)
    if crops < 1 or batch_size < 1:
        raise UserError(f'--crops={crops} --batch_size={batch_size}: both must be at least 1')
    structure, alias, stage1 = load_tokenizers(f'{out_dir}/tokenizer.pt', dev)
    for split in ('train', 'val'):
        encode_split(split, structure, alias, stage1, dev, autocast)


if __name__ == '__main__':
    runtime.run(main)
