"""A GPU that does not exist, for whole training steps at their real size: what they hold and where they wait.

    with FakeGPU() as gpu:
        with gpu.building():
            run = train_fvar.set_up(gpu.device, ...)
        train_fvar.train_step(run, ...)
    print(gpu.peak, gpu.waits)

Its tensors have shapes, types and strides but no data. Tensors on the CPU are real, and mixing both kinds raises
an error, as on a GPU. Autocast works, and attention uses the kernels it would use on a GPU. Only tensors are
counted: the CUDA context, NCCL, workspaces and fragmentation come on top.
"""
import collections
import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import model
import tokenizer
from pyramid import psf

# operations that make the CPU wait for a number from the GPU
WAITING = ('_local_scalar_dense', 'nonzero', 'multinomial', 'bincount', 'masked_select', '_unique2')

# tensors that Python code has held ("in hand"); for weights, with their node of autograd
HANDS = WeakIdKeyDictionary()


class FakeGPU(TorchDispatchMode):
    """peak, live: bytes of tensors. flops: of matrix products, convolutions and attention as executed.

    waits: {operation: count}. 'upload' and 'download' are copies to and from the GPU that the CPU waits for.
    Values fetched from the GPU are made up: True, 1.0 or 0.

    Autograd looks up the streams of any device that it takes for a GPU, and here there are none. Its nodes
    are therefore told 'meta': a tensor reports the GPU only after Python code has held it, not when it has
    just been computed.
    """

    def __init__(self):
        super().__init__()
        self.fake, self.device = FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda', 0)
        self.sizes, self.waits = WeakIdKeyDictionary(), collections.Counter()
        self.live, self.peak, self.flops = 0, 0, 0
        self.patches, self.generator = ExitStack(), torch.Generator

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()    # as FakeTensorMode does
        torch._C._set_only_lift_cpu_tensors(True)   # torch.tensor() starts on the CPU
        group = torch._C._group_tensors_by_device_and_dtype
        for owner, name, value in (
                (torch.cuda, '_lazy_init', lambda: None),
                (torch.cuda, 'is_available', lambda: True),
                (torch.cuda, 'is_bf16_supported', lambda *_, **__: True),
                (torch.cuda, 'set_device', lambda device: None),
                (torch.cuda, 'get_device_name', lambda *_: 'NVIDIA A100-SXM4-80GB'),
                # or autocast turns itself off
                (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False),
                (torch.Tensor, 'pin_memory', lambda tensor: tensor),
                (torch, 'Generator', lambda device='cpu': self.generator()),
                (torch._C, '_group_tensors_by_device_and_dtype',
                 lambda lists, indices: group(in_hands(lists), indices)),
                (model, 'checkpoint', checkpoint_in_hands),
                (tokenizer, 'checkpoint', checkpoint_in_hands)):
            self.patches.enter_context(mock.patch.object(owner, name, value))
        self.patches.enter_context(Hands())
        psf.cache_clear()                                   # must not mix real tensors with these
        return super().__enter__()

    def __exit__(self, *error):
        psf.cache_clear()
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self.patches.close()

    @contextmanager
    def building(self):
        """Networks built inside are on the GPU from the start, without initial values."""
        with (self.device,
              mock.patch.object(torch.nn.Module, 'to', lambda module, *_, **__: module),
              # it would resample until all values are in range
              mock.patch.object(torch.nn.init, 'trunc_normal_', lambda tensor, *_, **__: tensor)):
            yield

    def start(self):
        """Resets peak, FLOPs and waits."""
        self.peak, self.flops = self.live, 0
        self.waits.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix('aten::')
        if func is torch.ops.prim.device.default:
            return self.device if args[0] in HANDS else torch.device('meta')
        made_on = torch.device(kwargs.get('device') or 'cpu').type
        if made_on == 'meta':                               # like a tensor that says so
            kwargs['device'], made_on = self.device, 'cuda'
        leaves = tree_leaves((args, kwargs))
        if made_on == 'cpu' and not any(isinstance(t, FakeTensor) for t in leaves):
            return func(*args, **kwargs)
        kwargs |= {'generator': None} if 'generator' in kwargs else {}
        if name in ('_to_copy', 'copy_') and (copied := self.copy_between(name, args, kwargs)) is not None:
            return copied
        if name in WAITING:
            self.waits[name] += 1
        if name == '_local_scalar_dense':
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        if not all(isinstance(t, FakeTensor) for t in leaves if isinstance(t, torch.Tensor)):
            args, kwargs = tree_map_only(torch.Tensor, self.as_fake, (args, kwargs))
        with self.fake:
            out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, FakeTensor) and t.device.type == 'cuda':
                storage = t.untyped_storage()
                if storage not in self.sizes:
                    self.sizes[storage] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if (packet := func.overloadpacket) in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def copy_between(self, name, args, kwargs):
        """Counts a copy between CPU and GPU if the CPU waits for it. Returns a copy to the CPU, else None."""
        if name == '_to_copy':
            source, target = args[0], kwargs.get('device') or args[0].device
        else:
            source, target = args[1], args[0].device
        waited = not (kwargs.get('non_blocking') or (name == 'copy_' and args[2:3] == (True,)))
        target = torch.device(target).type
        if source.device.type == 'cpu' and target == 'cuda':
            self.waits['upload'] += waited
        elif source.device.type == 'cuda' and target == 'cpu':
            self.waits['download'] += waited
            made = torch.zeros(source.shape, dtype=kwargs.get('dtype') or source.dtype)
            return made if name == '_to_copy' else args[0].copy_(made)

    def as_fake(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def free(self, size):
        self.live -= size


class Hands(TorchFunctionMode):
    """Marks the tensors that Python code holds, and routes attention to the kernel it uses on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        in_hands((args, kwargs))
        if func is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return attention(*args, **kwargs)
        if kwargs.get('inplace'):                           # the result has just been computed
            HANDS.pop(args[0], None)
        return func(*args, **kwargs)


def in_hands(tensors):
    """Marks the tensors in nested lists and dictionaries, and returns its argument."""
    for t in tree_leaves(tensors):
        if isinstance(t, FakeTensor):
            node = HANDS.get(t)
            if isinstance(t, torch.nn.Parameter) and not node:
                HANDS.pop(t, None)
                with torch.enable_grad():                   # make its node before it reports the GPU
                    node = t.view_as(t).grad_fn.next_functions[0][0]
            HANDS[t] = node
    return tensors


def checkpoint_in_hands(function, *args, **more):
    """Python code holds the tensors that the backward pass recomputes, too."""
    def seen(*args, **more):
        with Hands():
            return function(*args, **more)
    return checkpoint(seen, *args, **more)


def attention(q, k, v, attn_mask=None, scale=None):
    """Flash attention where possible: in 16 bits, without mask, with heads of at most 256 channels."""
    if torch.is_autocast_enabled('cuda'):
        q, k, v = (t.to(torch.get_autocast_dtype('cuda')) for t in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros(*attn_mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, torch.is_grad_enabled(), scale=scale)[0]
