"""Stage 2: trains the student, and (distill=True) the teacher it learns from, on token maps (paper, Eq. 12).

    python train_fvar.py config/charts.py
    torchrun --nproc_per_node=8 train_fvar.py config/d16.py
    python train_fvar.py config/charts.py --distill=False --out_dir=out-var     # the plain VAR baseline

Reads tokenizer.pt and, when encode.py has been run, its token files; without them images are encoded at every
step. Writes to out_dir: student.pt (the deployed network, nothing else), fvar_state.pt (for --init_from=resume)
and fvar.jsonl (the log).
"""
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from util import runtime
from util.checkpoint import Log, check_same, digest, load_checkpoint, load_training_state, load_weights, read_weights, resumes, save_checkpoint, training_state
from configurator import UserError, configure
from data import EndlessBatches, TokenDataset, batches, in_order, normalize, open_dataset
from model import FVAR, Teacher, build_student, compile_blocks, held_out_loss, load_student
from published import load_official_student
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
embed_dim = 0                       # channels; 0 means 64·depth
num_heads = 0                   # attention heads; 0 means depth
mlp_ratio = 4.0                 # hidden width of the MLP relative to embed_dim
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
grad_accum_steps = 1            # forward and backward passes per step, each over batch_size / grad_accum_steps pictures
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
grad_checkpoint = False         # keep only the inputs of blocks and compute the rest again: a third more work, far less memory
fsdp = False                    # share weights and optimizer out over the ranks instead of copying them (FSDP2)
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # everything random follows from it
config = configure(globals())

# settings that a resumed run may change
MAY_CHANGE = ('init_from', 'out_dir', 'tokenizer', 'tokens', 'data', 'workers', 'steps', 'grad_accum_steps', 'eval_every',
              'eval_pictures', 'save_every', 'save_seconds', 'log_every', 'log_to', 'compile', 'grad_checkpoint', 'device')


class TokenFiles:
    """Pictures as token maps, read from encode.py's files. Batches are (structure (B, L), alias (B, La), labels (B,))."""

    def __init__(self, folder, tokenizer_digest):
        self.train, self.held_out = (TokenDataset(folder, split, tokenizer_digest) for split in ('train', 'val'))
        self.classes = self.train.classes

    def endless(self, start):
        for keys in EndlessBatches(len(self.train), batch_size, seed, runtime.rank(), runtime.world_size(), start):
            yield self.train.batch(np.array([index for index, _ in keys]))

    def validation(self, count, size):
        rows = np.linspace(0, len(self.held_out) - 1, min(count, len(self.held_out))).astype(int)  # all classes alike
        for first in range(0, len(rows), size):
            yield self.held_out.batch(rows[first:first + size])


class Images:
    """The same batches from images, encoded on the way: what runs when there are no token files."""

    def __init__(self, data, structure, alias, dev, autocast):
        self.structure, self.alias, self.dev, self.autocast = structure, alias, dev, autocast
        self.train = open_dataset(data, 'train', structure.image_size)
        self.held_out = open_dataset(data, 'val', structure.image_size, augment=False)
        self.classes = self.train.classes

    def encode(self, images, labels):
        images = normalize(runtime.to_device(images, self.dev)).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            return torch.cat(self.structure.encode(images), 1), torch.cat(self.alias.encode(images), 1), labels

    def endless(self, start):
        for batch in batches(self.train, batch_size, seed, runtime.rank(), runtime.world_size(), start, workers):
            yield self.encode(*batch)

    def validation(self, count, size):
        for batch in in_order(self.held_out, size, count=count):
            yield self.encode(*batch)


def open_source(tokenizer_file, structure, alias, trained_on, dev, autocast):
    folder = tokens or os.path.join(os.path.dirname(tokenizer_file), 'tokens')
    if os.path.isdir(folder) or tokens:
        return TokenFiles(folder, digest(structure.state_dict()))
    runtime.say(f'no token files in {folder}: encoding images at every step (encode.py makes this several times faster)')
    return Images(data or trained_on, structure, alias, dev, autocast)


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
    load_weights(student, weights, init_from)


# -----------------------------------------------------------------------------
# a step

def set_up(dev, structure, alias, num_classes, start_weights=None):
    """All that is trained and what trains it, on a device: a namespace. start_weights: of a finished student or a published one."""
    run = SimpleNamespace(structure=structure)
    run.autocast, run.scaler = runtime.precision(dtype, dev)
    run.network = build_network(structure, alias, num_classes, dev, start_weights).train()
    run.student = run.network.student
    run.student.grad_checkpoint = grad_checkpoint
    if compile:
        compile_blocks(blocks_of(run.network))
    if fsdp:
        runtime.shard(run.network, blocks_of(run.network), dev, runtime.dtype_of(run.autocast))
    run.optimizer = runtime.adamw(run.network, lr, betas, weight_decay)
    run.safe_step = runtime.SafeStep(run.optimizer, run.scaler, grad_clip)
    return run


def build_network(structure, alias, num_classes, dev, start_weights=None):
    """Student and teacher; the teacher starts as a copy of the student's last blocks, so the student's weights come first."""
    student, teacher = build_student(config, structure, num_classes).to(dev), None
    if start_weights:
        start_from(student, start_weights, structure)
    if distill:
        teacher = Teacher(student, alias.vocab_size, alias_scales, teacher_blocks, shared_blocks).to(dev)
    return FVAR(student, teacher, lambda_feat, lambda_logit)


def train_step(run, trained, step, batch):
    """One optimizer step on this rank's (structure tokens, alias tokens, labels). Returns (loss terms, gradient norm): tensors.

    trained: run.network, inside what averages its gradients over the ranks.
    """
    structure_tokens, alias_tokens, labels = batch
    numbers, student = runtime.sample_numbers(step, batch_size), run.student
    uniform = runtime.random_numbers(torch.rand, (1 + 2 * len(student.blocks),), numbers, labels.device, seed, 4)
    labels = torch.where(uniform[:, 0] < class_dropout, student.num_classes, labels)
    drop_path_mask, inputs = student.drop_path_mask(uniform[:, 1:]), token_inputs(run.structure, structure_tokens)

    parts = zip(*(t.chunk(grad_accum_steps) for t in (labels, inputs, structure_tokens, alias_tokens, drop_path_mask)))
    terms = {}                                              # averaged over the passes
    for i, part in enumerate(parts):
        last = i == grad_accum_steps - 1
        with runtime.without_sync(trained) if not last else nullcontext():
            with run.autocast():
                found = trained(*part, trust=min(1.0, (step + 1) / max(1, distill_warmup)))
            run.scaler.scale(found['total'] / grad_accum_steps).backward()
        terms = {name: terms.get(name, 0) + value.detach() / grad_accum_steps for name, value in found.items()}
    networks = [part.parameters() for part in run.network.children()]
    norm, _ = run.safe_step(networks, runtime.learning_rate(step, steps, lr, warmup), terms)
    return terms, norm


def flops_per_image(structure, alias, num_classes):
    """Of a training step, without what grad_checkpoint computes again."""
    with torch.device('meta'):
        network = build_network(structure, alias, num_classes, 'meta')
        lengths = network.student.lengths
        tokens, label = torch.empty(1, sum(lengths), dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        inputs = torch.empty(1, sum(lengths[1:]), structure.quantizer.codebook.embedding_dim)
        return runtime.count_flops(lambda: network(label, inputs, tokens, tokens[:, :sum(lengths[:-1])])['total'].backward())


# -----------------------------------------------------------------------------
# the run

def resume(run, state_file):
    """Takes up a stopped run; returns (step, metrics) of its checkpoint."""
    saved = load_checkpoint(state_file, 'fvar training', made_by='train_fvar.py', shared=True)
    check_same(saved['config'], config, [key for key in config if key not in MAY_CHANGE], state_file)
    load_training_state(run.network, run.optimizer, saved['network'], saved['optimizer'], state_file)
    run.scaler.load_state_dict(saved['scaler'])
    run.safe_step.load_state_dict(saved['safe_step'])
    return saved['step'], saved['metrics']


def main():
    dev = runtime.start(device, seed)
    runtime.require_positive(config, 'steps', 'eval_every', 'eval_pictures', 'save_every', 'log_every')
    runtime.require_shares(config, 'class_dropout', 'drop_path')
    at_once = runtime.share_of_batch(batch_size, grad_accum_steps)      # says so at once if it does not divide
    tokenizer_file = tokenizer or os.path.join(out_dir, 'tokenizer.pt')
    structure, alias, stage1 = load_tokenizers(tokenizer_file, dev)
    structure.requires_grad_(False)
    autocast, _ = runtime.precision(dtype, dev)
    source = open_source(tokenizer_file, structure, alias, stage1['config']['data'], dev, autocast)

    start_weights = None
    if init_from not in ('scratch', 'resume', 'auto'):
        if not os.path.isfile(init_from):
            raise UserError(f'--init_from={init_from}: no such file; choose scratch, resume, auto, a student.pt or a published transformer')
        start_weights = read_weights(init_from)
    run = set_up(dev, structure, alias, len(source.classes), start_weights)
    step, metrics, state_file = 0, {}, f'{out_dir}/fvar_state.pt'
    if resumes(init_from, state_file):
        step, metrics = resume(run, state_file)
    student, teacher = run.network.student, run.network.teacher
    runtime.say(f'student {count_parameters(student):.2f}M' + (f', teacher {count_parameters(teacher):.2f}M' if distill else '')
                + f', {len(source.train)} pictures of {sum(student.lengths)} tokens, {len(source.classes)} classes')

    def save(metrics):
        weights, optimizer_state = training_state(run.network, run.optimizer)
        if runtime.rank() == 0:
            common = {'config': config, 'step': step, 'metrics': metrics, 'tokenizer': digest(structure.state_dict())}
            save_checkpoint(f'{out_dir}/student.pt', {
                'kind': 'student', **common, 'classes': source.classes,
                'student': {name.removeprefix('student.'): w for name, w in weights.items() if name.startswith('student.')}})
            save_checkpoint(state_file, {
                'kind': 'fvar training', **common, 'network': weights, 'optimizer': optimizer_state,
                'scaler': run.scaler.state_dict(), 'safe_step': run.safe_step.state_dict()})
        runtime.barrier()

    trained = runtime.parallel(run.network)
    log = Log(f'{out_dir}/fvar.jsonl', step, log_to, config)
    bar = runtime.progress(steps, step, 'fvar' if distill else 'var', images_per_step=batch_size)
    supply = runtime.Waiting(source.endless(step))
    saving = runtime.Saving(save_every, save_seconds)
    speed = runtime.Speed(batch_size, flops_per_image(structure, alias, len(source.classes)), runtime.peak_flops(dev, autocast))
    speed.start(step)
    while step < steps:
        batch = [runtime.to_device(t, dev) for t in next(supply)]
        terms, norm = train_step(run, trained, step, batch)
        step += 1
        bar.update()

        if step % log_every == 0 or step == steps:
            per_map = runtime.all_reduce(terms.pop('per_map'), average=True)
            means = runtime.mean_terms(terms)
            log(step=step - 1, **means, per_map=per_map.tolist(), grad_norm=norm.item(), skipped=run.safe_step.check(),
                lr=run.optimizer.param_groups[0]['lr'], **speed.report(step))
            bar.set_postfix(ce=f'{means["ce"]:.3f}', **({'teacher': f'{means["teacher_ce"]:.3f}'} if distill else {}))
        if step % eval_every == 0 or step == steps:
            metrics = held_out_loss(run.network, structure, source.validation(eval_pictures, at_once), dev, run.autocast)
            run.network.train()
            log(step=step - 1, **{f'val_{name}': value for name, value in metrics.items()})
            runtime.say(f'step {step}: held-out cross-entropy {metrics["ce"]:.3f} ({metrics["bits_per_image"]:.0f} bits an image), '
                        'per token map ' + ' '.join(f'{ce:.2f}' for ce in metrics['ce_per_map'])
                        + (f'; teacher {metrics["teacher_ce"]:.3f}, kl {metrics["kl"]:.4f}' if distill else ''))
            speed.start(step)
        if saving.due(step, steps):
            save(metrics)
            saving.stop_if_asked(step)
            speed.start(step)
    saving.end()
    bar.close()
    runtime.say(f'wrote {out_dir}/student.pt; waited for data {supply.share():.1%} of the time')


def blocks_of(network):
    """The blocks of student and teacher: what is compiled, computed again and shared out piece by piece."""
    return [*network.student.blocks, *(network.teacher.blocks if network.teacher else ())]


def count_parameters(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


if __name__ == '__main__':
    runtime.run(main)
