"""
Every shipped kernel config, compiled for A100 (sm_80) and H100/H200 (sm_90) without a GPU: no spills, shared memory
within the limit, asynchronous copies where the kernel streams tiles.
    python tests/test_kernels_aot.py            # prints the table of the README
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = {80: 163 * 1024, 90: 227 * 1024}                  # bytes of shared memory per block
SM_86_LIMIT = 99 * 1024                                   # sm_86 and sm_89 run sm_80's configs
STREAMS = {'forward', 'dkdv', 'dq', 'lse', 'dz'}          # kernels that load tiles in a loop around a product
OVERSIZE = (128, 128, 8, 3)                               # of dq at head dim 128: must be refused on sm_80
CHANGES = {'n', 'Tq', 'Tk', 'T', 'n_row'}                 # launch arguments that differ from step to step
INT32 = {'LO', 'HI', 'QLO', 'QHI'}
SCALARS = {'qk_forward': {'T'}, 'qk_backward': {'T'}, 'add_norm': {'C'}, 'add_norm_backward': {'C'}}  # no pointers
STREAM = {'add_norm': {'X', 'S', 'G'}, 'add_norm_backward': {'DS', 'DX', 'G'}}             # float32 under autocast
WIDEST = 8192                                             # of residual and norm
FLOAT32 = {'LSE', 'DELTA', 'TOP', 'SUM', 'ZT', 'A', 'B', 'NLL', 'QG', 'KG', 'DG', 'COS', 'SIN', 'STAT', 'RSTD'}


def compile_one(kernel, cc, width, config, dtype):
    """Compile as the launcher would for aligned tensors of `dtype` and a length that is no multiple of anything."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import fused
    import kernels
    import loss
    import policy
    fn = next(getattr(m, f'_{kernel}_kernel') for m in (fused, kernels, loss) if hasattr(m, f'_{kernel}_kernel'))
    constants = dict(zip(policy.BLOCKS[kernel], config[:-2]))
    if width:
        constants['D'] = width
    if kernel.startswith('qk'):
        constants['H'] = 4096 // width                    # the widest
    if kernel.startswith('add_norm'):
        constants['BLOCK'] = WIDEST
    signature, aligned = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name[0].isupper() and name not in SCALARS.get(kernel, {'Tq', 'Tk'}):
            signature[name] = ('*i64' if name == 'T' else '*i32' if name in INT32 else
                               '*fp32' if name in FLOAT32 | STREAM.get(kernel, set()) else f'*{dtype}')
        else:
            signature[name] = 'fp32' if name.startswith(('scale', 'eps')) else 'i32'
        if signature[name][0] == '*' or name in ('width', 'col0', 'n_vocab', 'C') or re.fullmatch('s[a-z]{1,3}', name):
            aligned[(i,)] = [['tt.divisibility', 16]]     # what Triton sees in a pointer or stride that 16 divides
    made = triton.compile(ASTSource(fn, signature, constants, aligned), target=GPUTarget('cuda', cc, 32),
                          options=dict(num_warps=config[-2], num_stages=config[-1]))
    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(made.asm['cubin'])
        f.flush()
        usage = subprocess.run([tools / 'cuobjdump', '-res-usage', f.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / 'nvdisasm', '-c', f.name], capture_output=True, text=True, check=True).stdout
    usage = usage.stdout + usage.stderr
    count = {key: len(re.findall(pattern, code)) for key, pattern in
             dict(spills=r'\b(?:STL|LDL)\b', async_copies=r'\bLDGSTS', products=r'\b(?:HMMA|HGMMA)\b').items()}
    loose = [p.name for p in fn.params if signature[p.name] in ('i32', 'fp32') and not p.do_not_specialize]
    return dict(kernel=kernel, cc=cc, width=width, config=config, dtype=dtype, shared=made.metadata.shared, **count,
                specialised=loose,
                registers=int(re.search(r'REG:(\d+)', usage)[1]), stack=int(re.search(r'STACK:(\d+)', usage)[1]))


def compile_all(cc):
    """One row for each shipped config of an architecture."""
    import policy
    return [compile_one(kernel, cc, width, config, 'bf16')
            for (kernel, arch, width), config in policy.CONFIG.items() if arch == cc]


@pytest.fixture(scope='module')
def rows_and_oversize():
    pytest.importorskip('triton')
    if sys.platform != 'linux':
        pytest.skip('the compiler that comes with triton runs on Linux')
    from conftest import child_env                        # not above: importing it turns the interpreter on
    env = child_env(PYTHONPATH=str(ROOT))
    children = [subprocess.Popen([sys.executable, __file__, '--json', str(cc)], cwd=ROOT, text=True, env=env,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for cc in LIMIT]
    rows = []
    for child in children:
        out, err = child.communicate()
        assert child.returncode == 0, err
        rows += json.loads(out)
    return [r for r in rows if r['config'] != list(OVERSIZE)], next(r for r in rows if r['config'] == list(OVERSIZE))


@pytest.fixture(scope='module')
def rows(rows_and_oversize):
    return rows_and_oversize[0]


def test_every_config_is_compiled(rows):
    import policy
    assert {(r['kernel'], r['cc'], r['width']) for r in rows} == set(policy.CONFIG)
    assert {cc for _, cc, _ in policy.CONFIG} == set(LIMIT)


def test_no_config_spills(rows):
    bad = [r for r in rows if r['stack'] or r['spills']]
    assert not bad, bad


def test_shared_memory_fits(rows):
    bad = [r for r in rows if r['shared'] > (SM_86_LIMIT if r['cc'] == 80 else LIMIT[90])]
    assert not bad, bad


def test_tiles_are_copied_asynchronously_into_tensor_cores(rows):
    streams = [r for r in rows if r['kernel'] in STREAMS]
    assert len(streams) == 2 * (3 * 2 + 2)
    bad = [r for r in streams if not r['async_copies'] or not r['products']]
    assert not bad, bad


def test_no_step_compiles_again(rows):
    """Triton compiles anew where 16 begins or ceases to divide an argument, unless it is told not to look."""
    bad = [(r['kernel'], sorted(CHANGES & {*r['specialised']})) for r in rows if CHANGES & {*r['specialised']}]
    assert not bad, bad
    assert all('sx' in r['specialised'] for r in rows if r['kernel'] in ('lse', 'dz'))       # for loads of 16 bytes


def test_an_oversize_config_is_seen(rows_and_oversize):
    """The compiler accepts a config that no A100 can launch; only the checks above stop it."""
    oversize = rows_and_oversize[1]
    assert oversize['shared'] > LIMIT[80] or oversize['stack'], oversize


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ['--json']:
        cc = int(sys.argv[2])
        extra = [compile_one('dq', 80, 128, OVERSIZE, 'bf16')] if cc == 80 else []
        print(json.dumps(compile_all(cc) + extra))
        sys.exit()
    import triton
    print(f'triton {triton.__version__}\n')
    print('| kernel | GPU | head dim | blocks, warps, stages | registers | spills | shared KiB | async copies |')
    print('|---|---|---|---|---|---|---|---|')
    for cc in LIMIT:
        for r in compile_all(cc):
            *blocks, warps, stages = r['config']
            blocks = ' x '.join(map(str, blocks))
            print(f"| {r['kernel']} | sm_{cc} | {r['width'] or '-'} | {blocks}, {warps}, {stages} | {r['registers']} "
                  f"| {r['spills']} | {r['shared'] / 1024:.1f} | {r['async_copies']} |")
