"""Our side of the comparison: public functions of `lavit_jax.infer`."""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import pathlib

import jax
import numpy as np

from lavit_jax.core.storage import checkpoints
from lavit_jax.infer.decoding import beam, decode
from lavit_jax.infer.loading import visual
from lavit_jax.models import llama
from side_by_side import cases

_TOP = 25  # operations that a profile lists


class Side:
  """The work of each case, as calls that begin and end in numpy."""

  def __init__(self, folder, sizes: cases.Sizes, threads: int):
    """Nothing is loaded before a case needs it; threads are the cores'."""
    self._model = pathlib.Path(folder) / "model"
    self._sizes = sizes

  def versions(self) -> dict[str, str]:
    """Of the libraries that compute."""
    return {x: importlib.metadata.version(x) for x in ("jax", "jaxlib")}

  def work(self, case: cases.Case, batch: int):
    """What is timed: a function of no arguments that gives numpy arrays."""
    makers = {
      "beam": self._beam,
      "draw": functools.partial(self._draw, greedy=False),
      "tokenize": self._tokenize,
    }
    return makers[case.kind](case, batch)

  def judged(self, case: cases.Case, batch: int):
    """Beams with scores, drawing without chance; None where work serves."""
    if case.kind == "draw":
      return self._draw(case, batch, greedy=True)
    return self._beam(case, batch) if case.kind == "beam" else None

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a trace that Perfetto and TensorBoard open, and a summary."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
      yield
    traces = pathlib.Path(directory).rglob("*.xplane.pb")
    path = max(traces, key=lambda x: x.stat().st_mtime)
    summary = summarize(jax.profiler.ProfileData.from_file(str(path)))
    (pathlib.Path(directory) / "summary.txt").write_text(summary)

  @functools.cached_property
  def _llm(self):
    part = checkpoints.load_part(self._model, "llm")
    config = llama.LlamaConfig(**part.meta["llama"])
    # As class LaVIT holds it.
    return llama.for_decoding(llama.Llama(config), part.params["llm"])

  @functools.cached_property
  def _visual_parts(self):
    names = ("encoder", "tokenizer")
    return [checkpoints.load_part(self._model, name) for name in names]

  def _beam(self, case, batch):
    model, params = self._llm
    embeds = cases.embeds(case, self._sizes, batch)
    shape = embeds.shape[:2]
    prompt = {
      "tokens": np.zeros(shape, np.int32),
      "mask": np.ones(shape, bool),
      "embeds": embeds,
      "use_embeds": np.ones(shape, bool),
    }
    suppress = cases.suppressed(case, self._sizes)
    eos_id = cases.eos_id(case, self._sizes)

    def run():
      found = beam.beam_search(
        model,
        params,
        prompt=prompt,
        num_beams=case.num_beams,
        max_new_tokens=case.new_tokens,
        min_new_tokens=case.new_tokens,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        suppress=suppress,
        eos_id=eos_id,
        pad_id=eos_id,
      )
      ids, scores = np.asarray(found.tokens), np.asarray(found.scores)
      return {"ids": ids[:, 0], "scores": scores[:, 0]}

    return run

  def _draw(self, case, batch, greedy):
    model, params = self._llm
    ids = cases.drawing_prompt(case, self._sizes, batch)
    suppress = cases.suppressed(case, self._sizes)
    eos_id = cases.eos_id(case, self._sizes)

    def run():
      found = decode.generate(
        model,
        params,
        prompt={"tokens": ids, "mask": np.ones(ids.shape, bool)},
        rng=None if greedy else jax.random.key(0),
        max_new_tokens=case.new_tokens,
        min_new_tokens=case.new_tokens,
        top_k=cases.TOP_K,
        suppress=suppress,
        eos_id=eos_id,
        pad_id=eos_id,
        guidance_scale=cases.GUIDANCE,
        uncond={"tokens": ids[:1, -1:]},
        logprobs=False,
      )
      return {"ids": np.asarray(found.tokens)}

    return run

  def _tokenize(self, case, batch):
    encoder, stage1 = self._visual_parts
    fields = stage1.meta["tokenizer"] | {"merger_form": case.merger_form}
    stage1 = dataclasses.replace(stage1, meta={"tokenizer": fields})
    tokenizer = visual.VisualTokenizer(encoder, stage1)
    images = cases.images(self._sizes, batch)

    def run():
      rows = tokenizer.tokenize(images)
      keep = np.stack([row["keep"] for row in rows])
      return {"keep": keep, "codes": np.concatenate([r["codes"] for r in rows])}

    return run


def summarize(data) -> str:
  """Operations by the time they took, all threads and calls together.

  What runs inside another counts in both: `while` holds its whole body.
  """
  total = collections.defaultdict(float)
  calls = collections.Counter()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
          module, program = stats["hlo_module"], stats["program_id"]
          name = f"{module} {program}: {stats['hlo_op']}"
          total[name] += event.duration_ns / 1e6
          calls[name] += 1
  names = sorted(total, key=total.get, reverse=True)[:_TOP]
  rows = [f"{total[n]:10.1f} ms {calls[n]:8d} x  {n}" for n in names]
  return "\n".join(rows) + "\n"
