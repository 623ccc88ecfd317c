"""Generates pictures with a trained student: class grids, a GIF that comes into focus, edited photos.

    python sample.py
    python sample.py --out_dir=out-d16 --classes=207,980 --per_class=16 --cfg=4 --seed=3
    python sample.py --classes=none                             # without a class
    python sample.py --edit=PHOTO --mask=MASK.png               # inpainting: repaints where the mask is white
    python sample.py --edit=PHOTO --mask=8,8,24,24 --class=3    # class-conditional editing inside a box
    python sample.py --edit=PHOTO --outpaint=0,0,16,0           # outpainting, 16 pixels to the right
    python sample.py --refocus=PHOTO --radius=3                 # a photo that is 3 pixels out of focus
    torchrun --nproc_per_node=8 sample.py --num_samples=50000 --out=samples.npz             # for evaluate.py
    python sample.py --vae=vae_ch160v4096z32.pth --init_from=var_d16.pth --classes=207,980  # VAR's weights
    python sample.py --export=DIR                               # writes our weights in VAR's format

Reads only tokenizer.pt and student.pt: neither the teacher nor the training images are needed. Writes
samples.png and focus.gif to out_dir; or edit.png, outpaint.png or refocus.png, which show the photo next to
per_class results, and each result in a file of its own (edit-1.png, …). Photos are cropped to a square of the
student's image size (for --outpaint, to the space inside the margins); pixels are counted in that square.

--num_samples follows VAR's protocol: equally many samples per class, shuffled, as uint8 NHWC in arr_0 of an
.npz, with the classes in arr_1 and the settings in made_with. A sample's random numbers depend only on the
seed and on its position in the file, so the number of processes does not change it. Another --batch_size, GPU
or version of torch may sum in another order and change the last bits, which occasionally changes a token.
To continue an interrupted run, repeat the command.
"""
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import editing
from configurator import UserError, configure
from data import balanced_labels, close_table, open_table, sample_generators, to_uint8, undone_batches
from model import compile_sampling, pictures_at_once
from published import load_deployed, to_official
from util import runtime
from util.checkpoint import atomic_write, digest, locked
from util.pictures import (
    focus_labels, legible, load_mask, load_photo, picture_grid, place_photo, save_gif, save_png, to_picture,
)

# input and output
out_dir = 'out'                 # folder for the pictures
init_from = ''                  # student.pt (default: in out_dir), or with --vae a published transformer
tokenizer = ''                  # tokenizer.pt (default: next to student.pt)
vae = ''                        # a published VAR tokenizer instead
patch_nums = ()                 # token maps of published weights (default: read from them)
export = ''                     # folder for student and tokenizer in VAR's format; nothing is sampled
# classes
classes = ''                    # class numbers, for example 207,980, or none (default: the first ten)
per_class = 8                   # pictures per class, or variants of a photo
seed = 0                        # gives the same pictures for the same classes, per_class and batch_size
# many samples, for evaluation
num_samples = 0                 # how many, a multiple of the number of classes; published FIDs use 50,000
out = ''                        # .npz file to write (default: samples.npz in out_dir)
# editing a photo: a file, or the name of an embedded chart
edit = ''                       # photo to repaint in part
mask = ''                       # where: a picture of the photo's shape, white there; or LEFT,TOP,RIGHT,BOTTOM
outpaint = ()                   # or margins LEFT,TOP,RIGHT,BOTTOM to paint around it, in pixels of the result
refocus = ''                    # photo to bring into focus
radius = 0.0                    # radius of its blur, in pixels of the result
class_ = -1                     # class of the new content (default: none)
# sampling, with VAR's defaults
cfg = 1.5                       # guidance strength at the last token map, ramped up from 0; 0 turns it off
top_k = 900                     # keep the k most likely codes; 0 keeps all
top_p = 0.96                    # keep the most likely codes up to this total probability; 0 keeps all
smooth = False                  # Gumbel-softmax mixtures of codes: smoother pictures, not for FID
# system
compile = False                 # compile the sampling loop: takes minutes, pays off for many samples
batch_size = 0                  # pictures per batch (not for photos); 0: 50, or what fits in 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16
config = configure(globals())

sampling = {'cfg': cfg, 'top_k': top_k, 'top_p': top_p, 'smooth': smooth}


def check_settings():
    """Raises UserError for settings that do not go together."""
    runtime.require_positive(config, 'per_class')
    if bool(edit) != bool(mask or outpaint) or mask and outpaint:
        raise UserError('to edit a photo give --edit=PHOTO and one of --mask=MASK.png and '
                        '--outpaint=LEFT,TOP,RIGHT,BOTTOM')
    if bool(refocus) != bool(radius):
        raise UserError('to refocus a photo give --refocus=PHOTO and --radius=PIXELS')
    if sum(map(bool, (edit, refocus, num_samples, export))) > 1:
        raise UserError('give only one of --edit, --refocus, --num_samples and --export')
    photo = edit or refocus
    if class_ != -1 and not photo or classes and (photo or num_samples):
        raise UserError('--class=NUMBER goes with --edit and --refocus; these and --num_samples take '
                        'no --classes')
    if out and (not num_samples or not out.endswith('.npz') or Path(out).is_dir()):
        raise UserError(f'--out={out}: needs --num_samples=NUMBER and a file name ending in .npz')
    if runtime.world_size() > 1 and not num_samples:
        raise UserError('only --num_samples runs on several processes: start with python, not with torchrun')


def choose_classes(names):
    """The numbers of the classes to sample; "no class" is the number after the last.

    Raises UserError for a class that the student does not have.
    """
    numbers = range(len(names))
    asked = classes.split(',') if classes else numbers[:10]
    if edit or refocus:
        asked = [class_]
    if asked in (['none'], [-1]):
        return [len(names)]
    with suppress(ValueError):
        chosen = [int(number) for number in asked]
        if set(chosen) <= set(numbers):
            return chosen
    raise UserError(f'--class and --classes take numbers from 0 to {len(names) - 1}, or none; got {asked}')


def draw(structure, student, names, dev):
    """Writes pictures of the chosen classes, or edited photos, and says where. names: of all classes."""
    chosen = choose_classes(names)
    names = [*names, 'no class']
    labels = torch.tensor(chosen, device=dev).repeat_interleave(per_class)
    options = sampling | {'generator': torch.Generator(dev).manual_seed(seed)}
    if chosen == [student.num_classes]:
        options['cfg'] = 0
    if edit or refocus:
        files = edit_photo(structure, student, labels, options)
    else:
        row_names = [legible(names[c]) or str(c) for c in chosen]
        files = sample_classes(structure, student, labels, row_names, options)
    runtime.say(f'wrote {files}: ' + ', '.join(f'class {c} ({names[c]!r})' for c in chosen))


def sample_classes(structure, student, labels, row_names, options):
    """Writes samples.png, a row of per_class pictures for each of row_names, and focus.gif; returns both
    names."""
    samples = [student.generate(structure, batch, **options)
               for batch in labels.split(batch_size or pictures_at_once(student))]
    tokens, images = zip(*samples)
    images = torch.cat(images)
    save_png(f'{out_dir}/samples.png', picture_grid(images, per_class, row_names))

    # for up to five classes: the first picture, map by map, above the finished one, blurred to match
    first = slice(0, 5 * per_class, per_class)
    decoded = structure.decode_states([torch.cat(maps)[first] for maps in zip(*tokens)])
    blurred = structure.focus_states(images[first])
    titles = focus_labels(structure.radii, decoded, blurred)
    frames = [picture_grid(torch.cat(rows), len(rows[0]), ('decoded', 'blurred'), [title], side=160)
              for *rows, title in zip(decoded, blurred, titles)]
    save_gif(f'{out_dir}/focus.gif', frames)
    return f'{out_dir}/samples.png ({len(labels)} pictures) and {out_dir}/focus.gif'


def edit_photo(structure, student, labels, options):
    """Writes edit.png, outpaint.png or refocus.png, and every variant as a file of its own; returns the
    names."""
    size, dev = structure.image_size, labels.device
    if refocus:
        name, photo = 'refocus', load_photo(refocus, size).to(dev)
        shown = {'photo': photo}
        images = editing.refocus(student, structure, photo, radius, labels, **options)
    else:
        if outpaint:
            name, (photo, inside) = 'outpaint', place_photo(edit, size, outpaint)
        else:
            name, photo, inside = 'edit', load_photo(edit, size), load_mask(mask, edit, size)
        photo, inside = photo.to(dev), inside.to(dev)
        shown = {'photo': photo, 'mask': photo * (1 - inside)}
        images = editing.edit(student, structure, photo, inside, labels, **options)
    columns = [*shown, *map(str, range(1, per_class + 1))]
    grid = picture_grid(torch.cat([*shown.values(), images]), len(columns), column_names=columns)
    save_png(f'{out_dir}/{name}.png', grid)
    for i, image in enumerate(images, start=1):
        save_png(f'{out_dir}/{name}-{i}.png', to_picture(image))
    return f'{out_dir}/{name}.png and {out_dir}/{name}-1.png … {per_class}'


def generate_samples(structure, student, labels, batches, seed, autocast, **sampling):
    """Generates numbered samples: yields (numbers, images uint8 (B, 3, S, S) on the CPU) per batch.

    labels (N,): the class of every sample. batches: ranges or tensors of the sample numbers to generate. The
    random numbers of a sample depend only on the seed and its number. sampling: as in VAR.generate.
    """
    total = sum(map(len, batches))
    with runtime.progress(total, label='sample', images_per_step=runtime.world_size()) as bar:
        for numbers in batches:
            batch = runtime.to_device(labels[numbers], student.head.weight.device)
            generators = sample_generators(seed, numbers)
            with autocast():
                _, images = student.generate(structure, batch, generator=generators, **sampling)
            yield numbers, to_uint8(images).cpu()
            bar.update(len(numbers))


def write_samples(path, structure, student, student_step, autocast, dev):
    """Writes num_samples pictures to an .npz: arr_0 (N, S, S, 3) uint8, arr_1 (N,) classes, made_with (JSON).

    They are collected in a .partial file next to it. Raises UserError if num_samples is not a multiple of the
    number of classes.
    """
    size = structure.image_size
    partial = path.with_suffix('.partial')
    labels = balanced_labels(student.num_classes, num_samples, seed)
    made_with = {
        'num_samples': num_samples, 'seed': seed, **sampling,
        'dtype': str(runtime.dtype_of(autocast)), 'device': dev.type,
        'torch': torch.__version__, 'student_step': student_step, 'image_size': size,
        'student': digest(student.state_dict()), 'tokenizer': digest(structure.state_dict()),
    }
    # one row per sample; its last byte is set when the sample is complete
    table = open_table(partial, made_with, num_samples, size * size * 3 + 1, np.uint8, 0)
    batches = undone_batches(table, batch_size or pictures_at_once(student), 0)
    for numbers, images in generate_samples(
            structure, student, labels, batches, seed, autocast, **sampling):
        table[numbers, :-1] = images.permute(0, 2, 3, 1).flatten(1)
        table[numbers, -1] = 1
    table.flush()
    runtime.barrier()

    if runtime.rank() == 0:
        images = table[:, :-1].reshape(-1, size, size, 3)
        with atomic_write(path) as file:
            np.savez(file, images, labels.numpy(), made_with=json.dumps(made_with))
        close_table(partial)
        runtime.say(f'wrote {path}: {num_samples} pictures, {num_samples // student.num_classes} per class')
    runtime.barrier()


def export_weights(structure, student):
    """Writes tokenizer and student in VAR's format, under the file names of VAR's release."""
    channels = structure.encoder.conv_in.out_channels
    vocab_size, codebook_dim = structure.quantizer.codebook.weight.shape
    files = (f'{export}/vae_ch{channels}v{vocab_size}z{codebook_dim}.pth',
             f'{export}/var_d{len(student.blocks)}.pth')
    for path, weights in zip(files, to_official(structure, student)):
        with atomic_write(path) as file:
            torch.save({name: weight.contiguous().cpu() for name, weight in weights.items()}, file)
    runtime.say(f'wrote {" and ".join(files)}; token maps {",".join(map(str, structure.patch_nums))}')


def main():
    check_settings()
    dev = runtime.start(device, seed)
    autocast, _ = runtime.precision(dtype, dev)
    structure, student, _, checkpoint = load_deployed(
        out_dir, init_from, tokenizer, vae, patch_nums, dev)
    if compile:
        compile_sampling(student, dev)
    if num_samples:
        path = Path(out or f'{out_dir}/samples.npz')
        with locked(path.with_suffix('.lock')):
            write_samples(path, structure, student, checkpoint['step'], autocast, dev)
    elif export:
        export_weights(structure, student)
    else:
        with autocast():
            draw(structure, student, checkpoint['classes'], dev)


if __name__ == '__main__':
    runtime.run(main)
