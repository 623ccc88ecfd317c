"""Stage 2: trains the student, and (distill=True) its teacher, on token maps (paper, Eq. 12).

    python train_fvar.py config/charts.py
    torchrun --nproc_per_node=8 train_fvar.py config/d16.py
    python train_fvar.py config/charts.py --distill=False     # no teacher; VAR, given pyramid='scale' tokens

Reads tokenizer.pt and the token files of encode.py. Writes to out_dir: student.pt (the deployed network and
nothing else), fvar_state.pt (for --init_from=resume), fvar.jsonl (the log), progress.png (the same samples at
every validation) and loss.png (the loss curves).
"""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configurator import UserError, configure
from data import TokenDataset, endless_keys
from model import FVAR, Teacher, build_student, held_out_loss, load_student
from published import load_official_student
from tokenizer import load_tokenizers
from util import runtime, training
from util.checkpoint import (
    blame, check_resumed, digest, load_checkpoint, load_optimizer, load_weights, locked, read_log,
    read_weights, resumes, save_checkpoint, training_state)
from util.pictures import add_row, plot_losses

# input and output
out_dir = 'out'                 # everything is written here
init_from = 'scratch'           # scratch | resume | auto (resume if possible) | a student.pt | var_d16.pth
tokenizer = ''                  # tokenizer.pt of stage 1 (default: the one in out_dir)
tokens = ''                     # folder of encode.py's token files (default: tokens beside tokenizer.pt)
# student
depth = 16                      # blocks
embed_dim = 0                   # width; 0 means 64·depth
num_heads = 0                   # attention heads; 0 means depth
mlp_ratio = 4.0                 # width of the MLP relative to embed_dim
qk_norm = True                  # unit queries and keys with learned temperatures
shared_aln = False              # one AdaLN projection for all blocks (VAR's 512-px model)
drop_path = -1.0                # drop rate of the last block; −1 means VAR's 0.1·depth/24
class_dropout = 0.1             # fraction of labels replaced by "no class", for guidance
# teacher and distillation
distill = True                  # False: no teacher, the student alone
alias_scales = 2                # how many of the last token maps see alias tokens
teacher_blocks = 2              # blocks with Alias-Gate Cross-Attention
shared_blocks = -1              # blocks shared with the student; −1: all but teacher_blocks, 0: none
lambda_feat = 1.0               # weight of the feature term (paper)
lambda_logit = 0.5              # weight of the KL term (paper)
distill_warmup = 0              # steps over which both weights rise from 0, while the teacher knows little
# optimisation
optimizer = 'adamw'             # adamw (paper) | muon: for the matrices of the blocks, AdamW for the rest
steps = 400_000                 # optimizer steps (paper)
batch_size = 256                # images per step, summed over ranks (paper)
grad_accum_steps = 1            # forward and backward passes that a step is split into
lr = 1e-4                       # peak learning rate (paper, at batch 256)
warmup = 2000                   # steps of linear warm-up
betas = (0.9, 0.95)             # Adam's decay rates
weight_decay = 0.05             # on the weights of linear layers only
grad_clip = 2.0                 # maximum gradient norm of student and of teacher; 0: none
# bookkeeping
eval_every = 2000               # steps between validations
eval_pictures = 1000            # held-out images per validation
save_every = 2000               # steps between checkpoints
save_seconds = 1800.0           # or seconds, whichever comes first; 0 counts steps only
keep_best = False               # also keep the student of the lowest held-out loss, in student_best.pt
log_every = 20                  # steps between log lines
log_to = ''                     # also log to tensorboard | wandb, if installed
# system
compile = False                 # compile the blocks: slow to start, then faster steps
grad_checkpoint = False         # recompute activations in the backward pass: less memory, a third more work
fsdp = False                    # shard weights and optimizer over the ranks (FSDP2)
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # determines everything random
config = configure(globals())

# what a resumed run cannot change: parameters, optimizer state, and which images each step sees
FIXED = (
    'depth', 'embed_dim', 'num_heads', 'mlp_ratio', 'qk_norm', 'shared_aln', 'distill', 'alias_scales',
    'teacher_blocks', 'shared_blocks', 'optimizer', 'batch_size', 'seed')


# -----------------------------------------------------------------------------
# one step

def blocks_of(network):
    """All blocks of student and teacher, which are compiled and sharded one by one."""
    return [block for part in network.children() for block in part.blocks]


def build_network(student, alias):
    """The student with its teacher, which starts with copies of the student's last blocks."""
    student.grad_checkpoint = grad_checkpoint
    sizes = alias.vocab_size, alias_scales, teacher_blocks, shared_blocks
    return FVAR(student, Teacher(student, *sizes) if distill else None, lambda_feat, lambda_logit)


def start_from(student, structure, classes):
    """Fills the student from init_from, a student.pt or a published transformer.

    classes: the data's class names. Those that a student.pt knows keep their embeddings, others start anew.
    Published weights have no class names: if the counts agree, classes match by number.
    """
    saved = read_weights(init_from)
    if isinstance(saved, dict) and 'kind' in saved:
        loaded, saved = load_student(init_from, structure)
        known, matched_by = saved['classes'], 'name'
    else:
        loaded = load_official_student(saved, structure.patch_nums, student.num_heads)
        known, matched_by = classes if loaded.num_classes == len(classes) else [], 'number'
    weights, new = loaded.state_dict(), student.class_embed.weight.detach()
    *old, no_class = weights['class_embed.weight']
    row_of = dict(zip(known, old))
    kept = row_of.keys() & classes
    runtime.say(f'{init_from} knows {len(kept)} of {len(classes)} classes by {matched_by}: they keep their '
                'embeddings, the others start anew')
    if no_class.shape == new[0].shape:
        rows = [row_of.get(name, row) for name, row in zip(classes, new)]
        weights['class_embed.weight'] = torch.stack([*rows, no_class])
    load_weights(student, weights, init_from)


def set_up(dev, structure, alias, student):
    """The networks on a device and what trains them, as a namespace."""
    run = SimpleNamespace(structure=structure, alias=alias, dev=dev)
    if fsdp and optimizer == 'muon':
        raise UserError('--optimizer=muon needs whole matrices: use --fsdp=False or --optimizer=adamw')
    run.autocast, run.scaler = runtime.precision(dtype, dev)
    run.network = build_network(student, alias).to(dev)
    if compile:
        torch._dynamo.config.optimize_ddp = False           # it would split the blocks
        for block in blocks_of(run.network):
            block.compile()
    if fsdp:
        runtime.shard(run.network, blocks_of(run.network), dev, runtime.dtype_of(run.autocast))
    run.trained = runtime.parallel(run.network)             # averages gradients over the ranks
    run.optimizer = training.build_optimizer(
        optimizer, muon_weights(run.network), run.network, lr, betas, weight_decay)
    run.safe_step = training.SafeStep(run.optimizer, run.scaler, grad_clip)
    return run


def muon_weights(network):
    """The matrices that optimizer='muon' trains: those of the blocks, except AdaLN's."""
    return [parameter for block in blocks_of(network) for name, parameter in block.named_parameters()
            if parameter.ndim == 2 and not name.startswith('ada.')]


def train_step(run, step, batch):
    """One optimizer step on this rank's structure tokens (b, L), alias tokens (b, La) and labels (b,).

    Returns (loss terms by name, gradient norm), all tensors.
    """
    structure_tokens, alias_tokens, labels = (runtime.to_device(tensor, run.dev) for tensor in batch)
    numbers, student = runtime.sample_numbers(step, batch_size), run.network.student
    shape = (1 + 2 * len(student.blocks),)
    uniform = runtime.random_numbers(torch.rand, shape, numbers, labels.device, seed, 'dropout')
    labels = torch.where(uniform[:, 0] < class_dropout, student.num_classes, labels)
    inputs = run.structure.token_inputs(structure_tokens.split(student.lengths, 1))
    everything = labels, inputs, structure_tokens, alias_tokens, student.drop_path_mask(uniform[:, 1:])

    terms, distill_weight = {}, min(1.0, (step + 1) / max(1, distill_warmup))
    for i, part in enumerate(zip(*(t.chunk(grad_accum_steps) for t in everything))):
        # DDP averages gradients in the last pass; FSDP in each, because whole ones would have to be kept
        run.trained.require_backward_grad_sync = i == grad_accum_steps - 1
        with run.autocast():
            found = run.trained(*part, distill_weight=distill_weight)
        run.scaler.scale(found['total'] / grad_accum_steps).backward()
        terms = {name: terms.get(name, 0) + term.detach() / grad_accum_steps for name, term in found.items()}
    parameters = [network.parameters() for network in run.network.children()]
    norm, _ = run.safe_step(parameters, training.learning_rate(step, steps, lr, warmup))
    return terms, norm


def flops_per_image(run):
    """FLOPs of one training step per image, without what grad_checkpoint recomputes."""
    with torch.device('meta'):
        student = build_student(config, run.structure, run.network.student.num_classes)
        network, lengths = build_network(student, run.alias), student.lengths
        tokens = torch.zeros(1, sum(lengths), dtype=torch.int64)
        inputs = torch.empty(1, sum(lengths[1:]), student.word_embed.in_features)
        return 3 * training.count_flops(
            lambda: network(tokens[:, 0], inputs, tokens, tokens[:, :-lengths[-1]]))


# -----------------------------------------------------------------------------
# the run

def save(run, step, metrics, dataset, best=False):
    """Writes student.pt and fvar_state.pt; or if best, student_best.pt. dataset: what the run trains on."""
    weights, optimizer_state = training_state(run.network, run.optimizer)
    if runtime.rank() == 0:
        common = {'config': config, 'step': step, 'metrics': metrics,
                  'classes': dataset.classes, 'tokenizer': dataset.meta['tokenizer']}
        student = {name.removeprefix('student.'): weight for name, weight in weights.items()
                   if name.startswith('student.')}
        file = 'student_best' if best else 'student'
        save_checkpoint(f'{out_dir}/{file}.pt', common | {'kind': 'student', 'student': student})
        if not best:
            save_checkpoint(f'{out_dir}/fvar_state.pt', common | {
                'kind': 'fvar training', 'network': weights, 'optimizer': optimizer_state,
                'safe_step': run.safe_step.state_dict(), 'tokens': dataset.meta})


def show_progress(run, step, row, num_classes):
    """Adds a row to progress.png: a sample of each of the first eight classes, from fixed noise."""
    labels = torch.arange(min(8, num_classes), device=run.dev)
    noise = torch.Generator(run.dev).manual_seed(seed)
    with runtime.gathered(run.network), run.autocast():
        _, images = run.network.student.generate(run.structure, labels, cfg=1.0, top_p=0.5, generator=noise)
    if runtime.rank() == 0:
        add_row(f'{out_dir}/progress.png', row, images, f'step {step}')


def validate(run, step, dataset, held_out, size):
    """Prints and returns the held-out metrics, in batches of `size`; adds samples to progress.png."""
    # evenly spaced, because rows are ordered by class
    rows = np.linspace(0, len(held_out) - 1, min(eval_pictures, len(held_out))).astype(int)
    batches = map(held_out.batch, np.split(rows, range(size, len(rows), size)))
    metrics = held_out_loss(run.network, run.structure, batches, run.dev, run.autocast)
    # by step, because another rank may have logged this validation already
    earlier = [record['val_ce'] for record in read_log(f'{out_dir}/fvar.jsonl')
               if record.get('val_ce') is not None and record['step'] < step - 1]
    runtime.say(f'step {step}: held-out cross-entropy {metrics["ce"]:.3f} '
                f'({metrics["bits_per_image"]:.0f} bits per image), per token map '
                + ' '.join(f'{ce:.2f}' for ce in metrics['ce_per_map'])
                + ('; teacher {teacher_ce:.3f}, kl {kl:.4f}'.format(**metrics) if distill else ''))
    lowest = min(earlier, default=math.inf)
    if metrics['ce'] > lowest and earlier == sorted(earlier, reverse=True):
        runtime.say(f'note: it was {lowest:.3f} and is now rising, so the student is overfitting; '
                    'keep_best=True keeps the best one')
    if keep_best and runtime.from_rank_0(metrics['ce'] < lowest):
        save(run, step, metrics, dataset, best=True)
        runtime.barrier()
    show_progress(run, step, len(earlier), len(dataset.classes))
    run.network.train()
    return metrics


def resume(run, state_file, dataset):
    """Restores a stopped run; returns (step, metrics) of its checkpoint. dataset: the one to continue on."""
    saved = load_checkpoint(state_file, 'fvar training', made_by='train_fvar.py', shared=True)
    check_resumed(saved, config, FIXED, state_file)
    if saved['tokenizer'] != dataset.meta['tokenizer']:
        raise UserError(f'{state_file} was trained on the tokens of another tokenizer: use that '
                        '--tokenizer, or start anew with --init_from=scratch')
    if saved['classes'] != dataset.classes:
        raise UserError(f'{state_file} knows other classes, or the same in another order; start anew with '
                        f'--init_from={out_dir}/student.pt, which keeps those of the same name')
    if saved.get('tokens', dataset.meta) != dataset.meta:
        runtime.say('note: encode.py has written other token files since; the run continues on these')
    with blame(state_file):
        load_weights(run.network, saved['network'], state_file)
        load_optimizer(run.optimizer, saved['optimizer'])
        run.safe_step.load_state_dict(saved['safe_step'])
        return saved['step'], saved['metrics']


def main():
    # device, data
    dev = runtime.start(device, seed)
    runtime.require_positive(config, 'steps', 'eval_every', 'eval_pictures', 'save_every', 'log_every')
    if class_dropout > 1:
        raise UserError(f'class_dropout={class_dropout}: must be at most 1')
    batch_per_pass = runtime.share_of_batch(batch_size, grad_accum_steps)
    tokenizer_file = tokenizer or f'{out_dir}/tokenizer.pt'
    structure, alias, _ = load_tokenizers(tokenizer_file, dev)
    folder = tokens or Path(tokenizer_file).parent / 'tokens'
    made_by = digest(structure.state_dict())
    dataset, held_out = (TokenDataset(folder, split, made_by) for split in ('train', 'val'))
    if dataset.classes != held_out.classes:
        raise UserError(f'{folder}: train and val have different classes; run encode.py again')

    with locked(f'{out_dir}/fvar.lock'):
        # networks
        student = build_student(config, structure, len(dataset.classes))
        if init_from not in ('scratch', 'resume', 'auto'):
            start_from(student, structure, dataset.classes)
        run = set_up(dev, structure, alias, student)
        step, metrics, state_file = 0, {}, f'{out_dir}/fvar_state.pt'
        if resumes(init_from, state_file):
            step, metrics = resume(run, state_file, dataset)
        runtime.say(f'student {runtime.millions(student)}'
                    + (f', teacher {runtime.millions(run.network.teacher)}' if distill else '')
                    + f', {len(dataset)} images of {sum(student.lengths)} tokens, '
                      f'{student.num_classes} classes')

        # training
        keys = endless_keys(len(dataset), batch_size, seed, step)
        training.train(
            run, config, 'fvar', step, metrics, lambda: flops_per_image(run),
            train_step=lambda step: train_step(run, step, dataset.batch([row for row, _ in next(keys)])),
            validate=lambda step: validate(run, step, dataset, held_out, batch_per_pass),
            save=lambda step, metrics: save(run, step, metrics, dataset))
    if runtime.rank() == 0:
        plot_losses(f'{out_dir}/fvar.jsonl', f'{out_dir}/loss.png',
                    ('ce', 'val_ce', 'teacher_ce', 'val_teacher_ce'))
        runtime.say(f'wrote {out_dir}/student.pt and {out_dir}/progress.png')


if __name__ == '__main__':
    runtime.run(main)
