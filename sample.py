"""Pictures from a trained student: a class grid, a GIF of them coming into focus, edited and refocused photos.

    python sample.py
    python sample.py --out_dir=out-d16 --classes=207,980 --per_class=16 --cfg=4 --seed=3
    python sample.py --edit=PHOTO --mask=MASK.png               # inpainting: what is white in the mask is drawn anew
    python sample.py --edit=PHOTO --mask=8,8,24,24 --class=3    # class-conditional editing, in a box
    python sample.py --edit=PHOTO --outpaint=0,0,16,0           # outpainting, 16 pixels to the right
    python sample.py --refocus=PHOTO --radius=3                 # a photo 3 pixels out of focus
    torchrun --nproc_per_node=8 sample.py --num_samples=50000 --out=samples.npz                # for evaluate.py
    python sample.py --vae=vae_ch160v4096z32.pth --init_from=var_d16.pth --classes=207,980     # VAR's published files
    python sample.py --export=DIR                               # ours, under the published names

Only tokenizer.pt and student.pt are read: the teacher is not needed, nor are the images it was trained on. Writes to
out_dir: samples.png and focus.gif; or edit.png, outpaint.png or refocus.png, what the photo was beside per_class results,
and the results by themselves (edit-1.png …). Photos are cut to a square of the student's size; pixels are of that square.

With --num_samples, VAR's protocol: equally many samples of every class, shuffled, as uint8 NHWC in arr_0 of an .npz; arr_1
are the classes, made_with the settings. A sample's random numbers depend on the seed and its place in the file alone, so
the number of processes does not change it; another --batch_size, GPU or torch adds up in another order, which may change
last bits, and now and then by them a token. An interrupted run goes on where it stopped when the same command is given.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch

from util import runtime
from util.checkpoint import atomic_write, digest
from configurator import UserError, configure
from data import balanced_labels, close_table, open_table, sample_generators, to_uint8, undone_batches
from editing import edit as edit_photo, refocus as refocus_photo
from model import compile_sampling, pictures_at_once
from published import load_deployed, to_official
from util.pictures import load_mask, load_photo, picture_grid, place_photo, save_gif, save_png, to_picture

# input and output
out_dir = 'out'                 # where the pictures go
init_from = ''                  # student.pt (default: the one in out_dir), or with --vae a published transformer
tokenizer = ''                  # tokenizer.pt (default: the one beside student.pt)
vae = ''                        # a published VAR tokenizer instead
patch_nums = ()                 # token maps of published files (default: VAR's at 256 or 512 px)
export = ''                     # folder for student and tokenizer in VAR's published format; nothing is sampled then
# what to draw
classes = ()                    # class numbers (default: all, at most the first ten)
per_class = 8                   # pictures of each, or variants of a photo
seed = 0                        # the same seed gives the same pictures
# many samples instead of pictures to look at
num_samples = 0                 # how many, a multiple of the number of classes; published figures are of 50,000
out = ''                        # the .npz they go to (default: samples.npz in out_dir)
# what to do with a photo (a file, or the name of an embedded chart)
edit = ''                       # photo of which a part is drawn anew
mask = ''                       # that part: a picture of the photo's shape, white there, or the box LEFT,TOP,RIGHT,BOTTOM
outpaint = ()                   # or margins LEFT,TOP,RIGHT,BOTTOM around the photo, in pixels of the result
refocus = ''                    # photo that is out of focus
radius = 0.0                    # its blur, radius in pixels of the result
class_ = -1                     # class of what is drawn (default: none)
# how to sample; the defaults are VAR's
cfg = 1.5                       # guidance strength, ramped up over the token maps; 0 is none
top_k = 900                     # most likely codes kept; 0 is all
top_p = 0.96                    # probability kept; 0 is all
smooth = False                  # Gumbel-softmax mixtures of codes: smoother pictures, not for FID
kv_cache = True                 # False recomputes every earlier map: slow, the same pictures
# system
compile = False                 # compile the sampling loop: minutes of waiting, then faster; for many samples
batch_size = 0                  # pictures at a time; 0: 50, or as many as take 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16
config = configure(globals())


def check_settings():
    """UserError for settings that make no sense together."""
    if per_class < 1:
        raise UserError(f'--per_class={per_class}: must be at least 1')
    if bool(edit) != bool(mask or outpaint) or (mask and outpaint):
        raise UserError('to edit a photo give --edit=PHOTO and one of --mask=MASK.png and --outpaint=LEFT,TOP,RIGHT,BOTTOM')
    if bool(refocus) != bool(radius):
        raise UserError('to refocus a photo give --refocus=PHOTO and --radius=PIXELS')
    if edit and refocus:
        raise UserError('--edit and --refocus: one at a time')
    if (classes and (edit or refocus)) or (class_ != -1 and not (edit or refocus)):
        raise UserError('--class=NUMBER goes with --edit and --refocus, --classes=NUMBERS with sampling')
    if num_samples < 0 or (num_samples and (classes or edit or refocus or export)):
        raise UserError(f'--num_samples={num_samples}: give a number of samples of all classes alike, and no --classes, --edit, '
                        f'--refocus or --export')
    if out and (not num_samples or not out.endswith('.npz') or os.path.isdir(out)):
        raise UserError(f'--out={out}: give --num_samples=NUMBER, and as --out a file that ends in .npz')
    if runtime.world_size() > 1 and not num_samples:
        raise UserError('only --num_samples is shared by several processes: start this with python, not with torchrun')


def choose_classes(wanted, names):
    """Class numbers to draw, checked; UserError for a number that is no class."""
    wanted = wanted or range(min(10, len(names)))
    for c in wanted:
        if type(c) is not int or not 0 <= c < len(names):
            raise UserError(f'--class and --classes: {c} is no class; this student knows 0 to {len(names) - 1}')
    return list(wanted)


def draw_samples(structure, network, names, autocast, dev):
    """samples.png and focus.gif."""
    chosen = choose_classes(classes, names)
    labels = torch.tensor(chosen, device=dev).repeat_interleave(per_class)
    generator = torch.Generator(dev).manual_seed(seed)
    tokens, images = [], []
    for part in labels.split(batch_size or pictures_at_once(network)):
        with autocast():
            t, x = network.generate(structure, part, cfg, top_k, top_p, generator, smooth, kv_cache)
        tokens.append(t)
        images.append(x)
    images = torch.cat(images)
    save_png(f'{out_dir}/samples.png', picture_grid(images, per_class, [names[c] for c in chosen]))

    # one picture of every class, as each prefix of its token maps decodes
    tokens = [torch.cat(maps)[::per_class] for maps in zip(*tokens)]
    columns = min(5, len(chosen))
    frames = [picture_grid(state, columns, column_names=[f'focus state {k} of {len(tokens)}'], side=128)
              for k, state in enumerate(structure.decode_states(tokens), start=1)]
    save_gif(f'{out_dir}/focus.gif', frames)
    runtime.say(f'wrote {out_dir}/samples.png ({len(images)} pictures) and {out_dir}/focus.gif')


# what the last byte of a sample's row says while it is being drawn
NOT_YET, DONE = 0, 1


def write_samples(structure, network, checkpoint, autocast, dev):
    """The .npz of num_samples pictures: arr_0 (N, S, S, 3) uint8, arr_1 (N,) their classes, made_with the settings as JSON.

    Pictures wait beside it in a .partial file. UserError for a number of samples that classes can not share.
    """
    size, path = structure.image_size, Path(out or f'{out_dir}/samples.npz')
    labels, partial = balanced_labels(network.num_classes, num_samples, seed), path.with_suffix('.partial')
    made_with = {name: config[name] for name in ('num_samples', 'seed', 'cfg', 'top_k', 'top_p', 'smooth', 'dtype')}
    made_with |= {'device': dev.type, 'torch': torch.__version__, 'student_step': checkpoint['step'], 'image_size': size,
                  'student': digest(network.state_dict()), 'tokenizer': digest(structure.state_dict())}
    table = open_table(partial, made_with, num_samples, size * size * 3 + 1, np.uint8, NOT_YET)
    at_once = batch_size or pictures_at_once(network)
    undone = undone_batches(table, at_once, NOT_YET)
    bar = runtime.progress(len(undone), label='sample', images_per_step=at_once * runtime.world_size())
    for batch in undone:
        rows, generators = slice(batch.start, batch.stop), sample_generators(seed, batch)
        with autocast():
            _, images = network.generate(structure, runtime.to_device(labels[rows], dev), cfg, top_k, top_p, generators, smooth, kv_cache)
        table[rows, :-1] = to_uint8(images).permute(0, 2, 3, 1).flatten(1).cpu().numpy()
        table[rows, -1] = DONE
        bar.update()
    bar.close()
    table.flush()
    runtime.barrier()

    if runtime.rank() == 0:
        with atomic_write(path) as file:
            np.savez(file, table[:, :-1].reshape(-1, size, size, 3), labels.numpy(), made_with=np.array(json.dumps(made_with)))
        close_table(partial)
        runtime.say(f'wrote {path}: {num_samples} pictures, {num_samples // network.num_classes} of each class')
    runtime.barrier()


@torch.no_grad()
def draw_on_photo(structure, network, names, autocast, dev):
    """edit.png, outpaint.png or refocus.png, and every variant by itself."""
    size, label = structure.image_size, network.num_classes if class_ == -1 else choose_classes([class_], names)[0]
    labels = torch.full((per_class,), label, device=dev)
    sampling = {'cfg': 0 if class_ == -1 else cfg, 'top_k': top_k, 'top_p': top_p, 'smooth': smooth, 'kv_cache': kv_cache,
                'generator': torch.Generator(dev).manual_seed(seed)}
    if outpaint:
        photo, painted = place_photo(edit, size, outpaint)
    else:
        photo = load_photo(edit or refocus, size)
        painted = load_mask(mask, edit, size) if edit else None
    photo = photo.to(dev)
    with autocast():
        if refocus:
            stages, names_of_stages = [photo], ['photo']
            images = refocus_photo(network, structure, photo.expand(per_class, -1, -1, -1), radius, labels, **sampling)
        else:
            painted = painted.to(dev)
            stages, names_of_stages = [photo, photo + painted * (0 - photo)], ['photo', 'mask']
            images = edit_photo(network, structure, photo, painted, labels, **sampling)
    name = 'refocus' if refocus else 'outpaint' if outpaint else 'edit'
    columns = names_of_stages + [f'{i}' for i in range(1, per_class + 1)]
    save_png(f'{out_dir}/{name}.png', picture_grid(torch.cat([*stages, images]), len(columns), column_names=columns))
    for i, image in enumerate(images, start=1):
        save_png(f'{out_dir}/{name}-{i}.png', to_picture(image))
    runtime.say(f'wrote {out_dir}/{name}.png and {out_dir}/{name}-1.png … {per_class}')


def write_published(structure, network):
    """The two files under the names that VAR's own release has."""
    codebook = structure.quantizer.codebook
    files = (f'vae_ch{structure.encoder.conv_in.out_channels}v{codebook.num_embeddings}z{codebook.embedding_dim}.pth',
             f'var_d{len(network.blocks)}.pth')
    for name, weights in zip(files, to_official(structure, network)):
        with atomic_write(os.path.join(export, name)) as file:
            torch.save({key: value.contiguous().cpu() for key, value in weights.items()}, file)
    runtime.say(f'wrote {export}/{files[0]} and {export}/{files[1]}; token maps {",".join(map(str, structure.patch_nums))}')


def main():
    check_settings()
    dev = runtime.start(device, seed)
    autocast, _ = runtime.precision(dtype, dev)
    structure, network, _, checkpoint = load_deployed(out_dir, init_from, tokenizer, vae, patch_nums, dev)
    if compile:
        compile_sampling(network, dev)
    if num_samples:
        write_samples(structure, network, checkpoint, autocast, dev)
    elif export:
        write_published(structure, network)
    elif edit or refocus:
        draw_on_photo(structure, network, checkpoint['classes'], autocast, dev)
    else:
        draw_samples(structure, network, checkpoint['classes'], autocast, dev)


if __name__ == '__main__':
    runtime.run(main)
