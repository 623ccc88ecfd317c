"""Stage 2: trains the student, and (distill=True) the teacher it learns from, on token maps (paper, Eq. 12).

    python train_fvar.py config/charts.py
    torchrun --nproc_per_node=8 train_fvar.py config/d16.py
    python train_fvar.py config/charts.py --distill=False --out_dir=out-var     # the plain VAR baseline

Reads tokenizer.pt and, when encode.py has been run, its token files; without them images are encoded at every
step. Writes to out_dir: student.pt (the deployed network, nothing else), fvar_state.pt (for --init_from=resume)
and fvar.jsonl (the log).
"""
import math
import os
from contextlib import nullcontext

import numpy as np
import torch

import runtime
from configurator import UserError, configure
from data import EndlessBatches, TokenDataset, batches, in_order, normalize, open_dataset
from model import FVAR, Teacher, build_student, compile_blocks, load_official_student, load_student
from tokenizer import load_tokenizers

# input and output
out_dir = 'out'                 # everything is written here
init_from = 'scratch'           # scratch | resume | auto (resume if it can) | a student.pt, or VAR's published var_d16.pth or the like
tokenizer = ''                  # tokenizer.pt of stage 1 (default: the one in out_dir)
tokens = ''                     # folder of encode.py's token files (default: tokens beside tokenizer.pt)
data = ''                       # images, where there are no token files (default: what the tokenizer was trained on)
workers = 0                     # processes that decode images, where there are no token files
# the student
depth = 16                      # blocks
width = 0                       # channels; 0 means 64·depth
num_heads = 0                   # attention heads; 0 means depth
mlp_ratio = 4.0                 # hidden width of the MLP relative to width
qk_norm = True                  # unit queries and keys, learned temperatures
shared_aln = False              # one AdaLN projection for all blocks (VAR's 512-px model)
drop_path = -1.0                # stochastic depth of the last block; −1 means VAR's 0.1·depth/24
class_dropout = 0.1             # share of labels replaced by "no class", for guidance
# the teacher and what it passes on
distill = True                  # False: no teacher, plain VAR
alias_scales = 2                # the M last token maps that look at alias tokens
teacher_blocks = 2              # blocks with Alias-Gate Cross-Attention
shared_blocks = -1              # blocks of the student that the teacher reads; −1: all but teacher_blocks, 0: none
lambda_feat = 1.0               # weight of the feature term (paper)
lambda_logit = 0.5              # weight of the KL term (paper)
distill_warmup = 0              # steps over which both weights rise from 0: at first the teacher has nothing to tell
# optimisation
steps = 400_000                 # optimizer steps (paper)
batch_size = 256                # pictures a step, over all ranks (paper)
accumulate = 1                  # forward and backward passes a step, each over batch_size / accumulate pictures
lr = 1e-4                       # peak learning rate (paper, at batch 256)
warmup = 2000                   # steps of linear warm-up
betas = (0.9, 0.95)             # Adam's averages
weight_decay = 0.05             # on the weights of linear layers only
grad_clip = 2.0                 # largest gradient norm, of the student and of the teacher
# bookkeeping
eval_every = 2000               # steps between validations
eval_pictures = 1000            # held-out pictures a validation
save_every = 2000               # steps between checkpoints
save_seconds = 1800.0           # and seconds, whichever is first; 0: steps alone
log_every = 20                  # steps between log lines
log_to = ''                     # tensorboard | wandb: show what is logged there too, if it is installed
# system
compile = False                 # compile the blocks: a minute's wait, then faster steps
recompute = False               # keep only the inputs of blocks and compute the rest again: a third more work, far less memory
fsdp = False                    # share weights and optimizer out over the ranks instead of copying them (FSDP2)
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # everything random follows from it
config = configure(globals())

# settings that a resumed run may change
MAY_CHANGE = ('init_from', 'out_dir', 'tokenizer', 'tokens', 'data', 'workers', 'steps', 'accumulate', 'eval_every',
              'eval_pictures', 'save_every', 'save_seconds', 'log_every', 'log_to', 'compile', 'recompute', 'device')


class TokenFiles:
    """Pictures as token maps, read from encode.py's files. Batches are (structure (B, L), alias (B, La), labels (B,))."""

    def __init__(self, folder, tokenizer_digest):
        self.train, self.held_out = TokenDataset(folder, 'train'), TokenDataset(folder, 'val')
        self.classes = self.train.classes
        for dataset in (self.train, self.held_out):
            if dataset.meta.get('tokenizer') != tokenizer_digest:
                raise UserError(f'{folder}: these tokens come from another tokenizer; run encode.py again')

    def endless(self, start):
        for keys in EndlessBatches(len(self.train), batch_size, seed, runtime.rank(), runtime.world_size(), start):
            yield self.train.batch(np.array([index for index, _ in keys]))

    def validation(self, count, size):
        rows = np.linspace(0, len(self.held_out) - 1, min(count, len(self.held_out))).astype(int)  # all classes alike
        for first in range(0, len(rows), size):
            yield self.held_out.batch(rows[first:first + size])


class Images:
    """The same batches from images, encoded on the way: what runs when there are no token files."""

    def __init__(self, data, structure, alias, dev):
        self.structure, self.alias, self.dev = structure, alias, dev
        self.train = open_dataset(data, 'train', structure.image_size)
        self.held_out = open_dataset(data, 'val', structure.image_size, augment=False)
        self.classes = self.train.classes

    def encode(self, images, labels):
        images = normalize(images.to(self.dev))
        return torch.cat(self.structure.encode(images), 1), torch.cat(self.alias.encode(images), 1), labels

    def endless(self, start):
        for batch in batches(self.train, batch_size, seed, runtime.rank(), runtime.world_size(), start, workers):
            yield self.encode(*batch)

    def validation(self, count, size):
        for batch in in_order(self.held_out, size, count=count):
            yield self.encode(*batch)


def open_source(tokenizer_file, structure, alias, trained_on, dev):
    folder = tokens or os.path.join(os.path.dirname(tokenizer_file), 'tokens')
    if os.path.isdir(folder) or tokens:
        return TokenFiles(folder, runtime.digest(structure.state_dict()))
    runtime.say(f'no token files in {folder}: encoding images at every step (encode.py makes this several times faster)')
    return Images(data or trained_on, structure, alias, dev)


def randomness(step, student):
    """What step `step` draws for this rank's pictures: which labels to drop (B,), stochastic depth (B, 2·depth).

    Drawn for the global batch, so that any number of ranks trains alike, and a function of (seed, step), so that
    a resumed run needs no saved random state.
    """
    generator = runtime.generator(seed, step, 4)
    dropped = torch.rand(batch_size, generator=generator) < class_dropout
    return runtime.local_slice(dropped), runtime.local_slice(student.drop_path_factors(batch_size, generator))


def token_inputs(structure, structure_tokens):
    """What the student reads, from the tokens alone: the codebook and φ, never the encoder."""
    return structure.token_inputs(list(structure_tokens.split([p * p for p in structure.patch_nums], 1)))


def start_from(student, saved, structure):
    """Fills the student from a student.pt or a published transformer; for another number of classes, theirs start anew."""
    if 'word_embed.weight' in saved:
        weights = load_official_student(saved, structure.patch_nums, student.num_heads).state_dict()
    else:
        weights = load_student(init_from, structure)[0].state_dict()
    classes, none = weights['class_embed.weight'][:-1], weights['class_embed.weight'][-1:]
    if len(classes) != student.num_classes:
        runtime.say(f'{init_from} knows {len(classes)} classes, the data has {student.num_classes}: their embeddings start anew')
        fresh = student.class_embed.weight.detach()[:-1].to(none)
        weights['class_embed.weight'] = torch.cat([fresh, none]) if fresh.shape[1] == none.shape[1] else none
    runtime.load_weights(student, weights, init_from)


@torch.no_grad()
def validate(network, source, structure, dev, autocast):
    """Held-out loss terms averaged over pictures, in nats a token; 'ce_per_map' for each token map; bits an image.

    Every rank does all of it: against eval_every steps of training that is nothing, and no rank has to wait.
    """
    network.eval()
    sums, count = {}, 0
    for structure_tokens, alias_tokens, labels in source.validation(eval_pictures, 100):
        structure_tokens, alias_tokens, labels = structure_tokens.to(dev), alias_tokens.to(dev), labels.to(dev)
        with autocast():
            terms = network(labels, token_inputs(structure, structure_tokens), structure_tokens, alias_tokens)
        sums = {name: sums.get(name, 0) + value.float() * len(labels) for name, value in terms.items()}
        count += len(labels)
    network.train()
    per_map = (sums.pop('per_map') / count).tolist()
    bits = sum(ce * p * p for ce, p in zip(per_map, structure.patch_nums)) / math.log(2)
    return {name: value.item() / count for name, value in sums.items()} | {'ce_per_map': per_map, 'bits_an_image': bits}


def main():
    dev = runtime.start(device, seed)
    autocast, scaler = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'steps', 'eval_every', 'eval_pictures', 'save_every', 'log_every')
    runtime.require_shares(config, 'class_dropout', 'drop_path')
    runtime.share_of_batch(batch_size, accumulate)          # says so at once if it does not divide
    tokenizer_file = tokenizer or os.path.join(out_dir, 'tokenizer.pt')
    structure, alias, stage1 = load_tokenizers(tokenizer_file, dev)
    structure.requires_grad_(False)
    source = open_source(tokenizer_file, structure, alias, stage1['config']['data'], dev)

    student = build_student(config, structure, len(source.classes)).to(dev)
    if init_from not in ('scratch', 'resume', 'auto'):
        if not os.path.isfile(init_from):
            raise UserError(f'--init_from={init_from}: no such file; choose scratch, resume, auto, a student.pt or a published transformer')
        start_from(student, runtime.read_weights(init_from, dev), structure)
    teacher = None
    if distill:
        teacher = Teacher(student, alias.vocab_size, alias_scales, teacher_blocks, shared_blocks).to(dev)
    network = FVAR(student, teacher, lambda_feat, lambda_logit).train()
    student.recompute = recompute
    if compile:
        compile_blocks(blocks_of(network))
    if fsdp:
        runtime.shard(network, blocks_of(network), dev)
    optimizer = runtime.adamw(network, lr, betas, weight_decay)
    safe_step = runtime.SafeStep(optimizer, scaler, grad_clip)

    step, figures, state_file = 0, {}, f'{out_dir}/fvar_state.pt'
    if runtime.resumes(init_from, state_file):
        saved = runtime.load_checkpoint(state_file, 'fvar training', dev, made_by='train_fvar.py')
        runtime.check_same(saved['config'], config, [key for key in config if key not in MAY_CHANGE], state_file)
        runtime.load_training_state(network, optimizer, saved['network'], saved['optimizer'], state_file)
        scaler.load_state_dict(saved['scaler'])
        safe_step.load_state_dict(saved.get('safe_step', {}))
        torch.set_rng_state(saved['random_state'].cpu())
        step, figures = saved['step'], saved.get('figures', {})
    runtime.say(f'student {count_parameters(student):.2f}M' + (f', teacher {count_parameters(teacher):.2f}M' if distill else '')
                + f', {len(source.train)} pictures of {sum(student.lengths)} tokens, {len(source.classes)} classes')

    def save(figures):
        weights, optimizer_state = runtime.training_state(network, optimizer)
        if runtime.rank() == 0:
            common = {'config': config, 'step': step, 'figures': figures, 'tokenizer': runtime.digest(structure.state_dict())}
            runtime.save_checkpoint(f'{out_dir}/student.pt', {
                'kind': 'student', **common, 'classes': source.classes,
                'student': {name.removeprefix('student.'): w for name, w in weights.items() if name.startswith('student.')}})
            runtime.save_checkpoint(state_file, {
                'kind': 'fvar training', **common, 'network': weights, 'optimizer': optimizer_state,
                'scaler': scaler.state_dict(), 'safe_step': safe_step.state_dict(), 'random_state': torch.get_rng_state()})
        runtime.barrier()

    trained = runtime.parallel(network, dev)
    log = runtime.Log(f'{out_dir}/fvar.jsonl', step, log_to, config)
    bar = runtime.progress(steps, step, 'fvar' if distill else 'var', scale=batch_size)
    supply = runtime.Waiting(source.endless(step))
    saving = runtime.Saving(save_every, save_seconds, dev)
    while step < steps:
        structure_tokens, alias_tokens, labels = (t.to(dev, non_blocking=True) for t in next(supply))
        dropped, keep = (t.to(dev) for t in randomness(step, student))
        labels = torch.where(dropped, student.num_classes, labels)
        inputs = token_inputs(structure, structure_tokens)

        parts = zip(*(t.chunk(accumulate) for t in (labels, inputs, structure_tokens, alias_tokens, keep)))
        terms = {}                                          # averaged over the parts
        for i, part in enumerate(parts):
            last = i == accumulate - 1
            with runtime.without_sync(trained) if not last else nullcontext():
                with autocast():
                    found = trained(*part, trust=min(1.0, (step + 1) / max(1, distill_warmup)))
                scaler.scale(found['total'] / accumulate).backward()
            terms = {name: terms.get(name, 0) + value.detach() / accumulate for name, value in found.items()}
        norm = safe_step([part.parameters() for part in network.children()], runtime.learning_rate(step, steps, lr, warmup), terms)
        step += 1
        bar.update()

        if step % log_every == 0 or step == steps:
            per_map = runtime.all_reduce(terms.pop('per_map'), average=True)
            means = runtime.mean_terms(terms)
            log(step=step - 1, **means, per_map=per_map.tolist(), grad_norm=norm, skipped=safe_step.skipped, spikes=safe_step.spikes)
            bar.set_postfix(ce=f'{means["ce"]:.3f}', **({'teacher': f'{means["teacher_ce"]:.3f}'} if distill else {}))
        if step % eval_every == 0 or step == steps:
            figures = validate(network, source, structure, dev, autocast)
            log(step=step - 1, **{f'val_{name}': value for name, value in figures.items()})
            runtime.say(f'step {step}: held-out cross-entropy {figures["ce"]:.3f} ({figures["bits_an_image"]:.0f} bits an image), '
                        'per token map ' + ' '.join(f'{ce:.2f}' for ce in figures['ce_per_map'])
                        + (f'; teacher {figures["teacher_ce"]:.3f}, kl {figures["kl"]:.4f}' if distill else ''))
        if saving.due(step, steps):
            save(figures)
            saving.stop_if_asked(step)
    saving.end()
    bar.close()
    runtime.say(f'wrote {out_dir}/student.pt; waited for data {supply.share():.1%} of the time')


def blocks_of(network):
    """The blocks of student and teacher: what is compiled, recomputed and shared out piece by piece."""
    return [*network.student.blocks, *(network.teacher.blocks if network.teacher else ())]


def count_parameters(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


if __name__ == '__main__':
    runtime.run(main)
