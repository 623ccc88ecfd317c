"""Pictures from a trained student: a labelled grid of classes, and a GIF of them coming into focus.

    python sample.py
    python sample.py --out_dir=out-d16 --classes=207,980 --per_class=16 --cfg=4 --seed=3

Only tokenizer.pt and student.pt are read: the teacher is not needed, nor are the images it was trained on.
Writes out_dir/samples.png and out_dir/focus.gif.
"""
import os

import torch

import runtime
from configurator import UserError, configure
from model import load_student
from pictures import picture_grid, save_gif, save_png
from tokenizer import load_tokenizers

# input and output
out_dir = 'out'                 # where the pictures go
student = ''                    # student.pt (default: the one in out_dir)
tokenizer = ''                  # tokenizer.pt (default: the one beside student.pt)
# what to draw
classes = ()                    # class numbers (default: all, at most the first ten)
per_class = 8                   # pictures of each
seed = 0                        # the same seed gives the same pictures
# how to sample; the defaults are VAR's
cfg = 1.5                       # guidance strength, ramped up over the token maps; 0 is none
top_k = 900                     # most likely codes kept; 0 is all
top_p = 0.96                    # probability kept; 0 is all
smooth = False                  # Gumbel-softmax mixtures of codes: smoother pictures, not for FID
kv_cache = True                 # False recomputes every earlier map: slow, the same pictures
# system
batch_size = 50                 # pictures at a time
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16
config = configure(globals())


def choose_classes(wanted, names):
    """Class numbers to draw, checked; UserError for a number that is no class."""
    wanted = wanted or range(min(10, len(names)))
    for c in wanted:
        if type(c) is not int or not 0 <= c < len(names):
            raise UserError(f'--classes: {c} is no class; this student knows 0 to {len(names) - 1}')
    return list(wanted)


def main():
    dev = runtime.start(device, seed)
    autocast, _ = runtime.precision(dtype, dev)
    if per_class < 1 or batch_size < 1:
        raise UserError(f'--per_class={per_class} --batch_size={batch_size}: both must be at least 1')
    student_file = student or os.path.join(out_dir, 'student.pt')
    tokenizer_file = tokenizer or os.path.join(os.path.dirname(student_file), 'tokenizer.pt')
    structure, _, _ = load_tokenizers(tokenizer_file, dev)
    network, checkpoint = load_student(student_file, structure, dev)
    names = checkpoint['classes']
    chosen = choose_classes(classes, names)

    labels = torch.tensor(chosen, device=dev).repeat_interleave(per_class)
    generator = torch.Generator(dev).manual_seed(seed)
    tokens, images = [], []
    for part in labels.split(batch_size):
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


if __name__ == '__main__':
    runtime.run(main)
