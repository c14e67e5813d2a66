"""Brings a pretrained model in, as a work directory, and takes a model out, as a folder that transformers loads.

  python -m evo_jax.convert --source=PATH --workdir=DIR [--windows=FILE] [--dtype=bfloat16] [--mesh=data:1,fsdp:8]
  python -m evo_jax.convert --workdir=DIR --export=OUT [--step=N] [--mesh=data:1,fsdp:8]

PATH is a folder as Hugging Face writes it (config.json, safetensors, tokenizer.json), a .gguf file, a .whl or .zip that
holds one, or hf://OWNER/NAME (extra `hub`). Llama 2 to 3.3, SmolLM2, Mistral, Qwen2.5 and Qwen3, dense. DIR is then a
work directory at step 0: `evaluate`, `generate` and `main --config=DIR/config.py` take it.

OUT has the tensors bit for bit as they came in, where nothing trained them; what Evo adds is in evo.safetensors beside
them, so that importing OUT gives the whole model again. A model trained from nothing is exported as a Llama.
"""

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.errors import UserError
from evo_jax.parallel import sharding
from evo_jax.pretrained import exporter, importer
from evo_jax.pretrained.evo_file import EvoFile
from evo_jax.pretrained.source import open_source

_IMPORT_FLAGS = ("source", "windows", "dtype", "param_dtype", "context", "ignore")
_EXPORT_FLAGS = ("export", "step", "export_dtype", "shard_mib")


def main() -> None:
  args = flags.FLAGS
  if bool(args.source) == bool(args.export):
    raise UserError("--source=PATH brings a model in, --export=OUT takes one out: give one of them")
  if not args.workdir:
    raise UserError("--workdir is needed, as in --workdir=runs/mine")
  other = _EXPORT_FLAGS if args.source else _IMPORT_FLAGS
  if misplaced := [name for name in other if args[name].present]:
    raise UserError(f"--{misplaced[0]}: does not go with {'--source' if args.source else '--export'}")
  if not args.mesh and not args.num_processes and not args.distributed:
    jax.config.update("jax_platforms", "cpu")  # a model may be larger than one accelerator's memory
  cli.join_processes()
  if args.source:
    bring_in(args, _mesh(args))
  else:
    take_out(args, _mesh(args))


def _mesh(args: flags.FlagValues) -> jax.sharding.Mesh:
  """What --mesh says; else one device."""
  if args.mesh or jax.process_count() > 1:
    return cli.make_mesh()
  return sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])


def bring_in(args: flags.FlagValues, mesh: jax.sharding.Mesh) -> None:
  """--source."""
  options = importer.Options(args.dtype, args.param_dtype or "", args.context, tuple(args.ignore))
  source = open_source(args.source)
  try:
    windows = EvoFile(args.windows) if args.windows else None
    imported = importer.import_model(source, args.workdir, options, mesh, windows)
  finally:
    source.close()
  if jax.process_index() == 0:
    print(describe(source.config, imported))
    print(
      f"{args.workdir}: step 0; --config={args.workdir}/config.py goes on training it, windows.py its windows alone"
    )


def describe(config: dict, imported: importer.Imported) -> str:
  """What came in, and what did not, in lines."""
  model, tokenizer = imported.config.model, imported.tokenizer
  own = [name for name, on in (("biases of q, k, v", model.qkv_bias), ("norms of q, k", model.qk_norm)) if on]
  own += [f"rotary scaling {model.rope_scaling}"] if model.rope_scaling != "none" else []
  own += ["tied head"] if model.tie_embeddings else []
  surplus = model.vocab_size - tokenizer.vocab_size
  return "\n".join(
    [
      f"architecture  {config['architectures'][0]}: {model.layers} layers x {model.width}, {model.heads} heads of "
      f"{model.head_size}, {model.kv_heads} for keys and values, {model.hidden} hidden"
      + "".join(f", {detail}" for detail in own),
      f"parameters    {imported.parameters - imported.own:,} in {model.param_dtype}, and {imported.own:,} of Evo's own",
      f"tokenizer     {tokenizer.identity}: {tokenizer.vocab_size:,} tokens"
      + (f", and {surplus:,} rows without one, which are ruled out" if surplus else ""),
      f"context       up to {model.position_limit:,} tokens; sequences of {model.context:,} in evaluation and training",
      f"not imported  {', '.join(imported.left_out) or 'nothing'}",
    ]
  )


def take_out(args: flags.FlagValues, mesh: jax.sharding.Mesh) -> None:
  """--export."""
  exporter.check_output(args.export)
  run = run_lib.load_run(args.workdir, args.step, mesh, exact=True)
  files = exporter.export_run(run, args.workdir, args.export, args.export_dtype or "", args.shard_mib * 2**20)
  if jax.process_index() == 0:
    print(f"{args.export}: {', '.join(files)}")


if __name__ == "__main__":
  dtypes = list(config_lib.DTYPES)
  flags.DEFINE_string("workdir", "", "The work directory: to be made by --source, to be read by --export.")
  flags.DEFINE_string("source", "", "A model's folder, .gguf, .whl or .zip, or hf://OWNER/NAME.")
  flags.DEFINE_string("windows", "", "An evo.safetensors with trained windows; default: the folder's own.")
  flags.DEFINE_enum("dtype", "float32", dtypes, "Of computation.")
  flags.DEFINE_enum("param_dtype", None, dtypes, "Of the parameters; default: as stored.")
  flags.DEFINE_integer(
    "context",
    0,
    "Tokens of a sequence in evaluation and training; 0: 1024, or as many as the model takes.",
    lower_bound=0,
  )
  flags.DEFINE_list("ignore", [], "Unknown fields of config.json that change no result.")
  flags.DEFINE_string("export", "", "The folder to write, which must be empty or not there.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_enum(
    "export_dtype", None, dtypes, "Of the tensors; default: as they came in where that loses nothing, else as trained."
  )
  flags.DEFINE_integer("shard_mib", 2048, "Largest size of a file of tensors.", lower_bound=1)
  cli.define_mesh()
  cli.define_processes()
  cli.run(main)
