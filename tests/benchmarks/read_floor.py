"""The read floor of a grouped GEMM: how long the best of a few kernels takes that only read the active
weights.

A kernel that must read the same bytes cannot be faster, launch and ramp included (but for the little that L2
keeps, which the rotation of the weights keeps small). So percentages of it hold where percentages of a
data-sheet bandwidth mislead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sm12x.validation.device import Gpu
from sm12x.validation.timing import Contender, capture, interleave

SOURCE = r"""
// Segment s of a call lies at segments[s] and has `chunks_per_segment` chunks; CTAs take chunks in turn.
extern "C" __global__ void read_segments(
    const unsigned long long* segments, unsigned chunks_per_segment, unsigned chunks, unsigned chunk_bytes,
    unsigned* sink) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  for (unsigned c = blockIdx.x; c < chunks; c += gridDim.x) {
    const char* chunk = (const char*)segments[c / chunks_per_segment] +
                        (unsigned long long)(c % chunks_per_segment) * chunk_bytes;
    #pragma unroll 8
    for (unsigned at = threadIdx.x * 16; at < chunk_bytes; at += blockDim.x * 16) {
      uint4 v;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(chunk + at));
      sum.x ^= v.x; sum.y ^= v.y; sum.z ^= v.z; sum.w ^= v.w;
    }
  }
  // Never true for our data, but the compiler cannot know: the loads stay.
  if ((sum.x ^ sum.y) == 0x9e3779b9u && (sum.z ^ sum.w) == 0x7f4a7c15u) *sink = sum.x;
}
"""
CHUNKS = (4096, 8192, 16384, 32768)
SHAPES = ((256, 8), (512, 4))  # threads of a CTA, CTAs of an SM


class ReadFloor:
    """Needs CuPy, which compiles the kernel; raises ImportError where it is missing."""

    def __init__(self, gpu: Gpu) -> None:
        import cupy

        self.cupy: Any = cupy
        self.gpu = gpu
        self.stream = cupy.cuda.ExternalStream(gpu.stream)
        self.kernel = cupy.RawKernel(SOURCE, "read_segments")
        self.sink = cupy.zeros(1, cupy.uint32)

    def best(self, calls: Sequence[Sequence[int]], segment_bytes: int) -> tuple[Contender, str]:
        """`calls`: for each call of the graph, the addresses of the segments that it reads. The fastest of
        the sweep.
        """
        contenders = {}
        cupy = self.cupy
        distinct = {tuple(call): cupy.asarray(call, dtype=cupy.uint64) for call in calls}
        cupy.cuda.Device().synchronize()
        for chunk in CHUNKS:
            if segment_bytes % chunk:
                continue
            for threads, ctas in SHAPES:
                launches = [
                    self._launch(distinct[tuple(call)], segment_bytes // chunk, chunk, threads, ctas)
                    for call in calls
                ]
                launches[0]()
                contenders[f"chunk {chunk}, {threads} threads, {ctas} CTAs per SM"] = capture(
                    self.gpu, launches
                )
        if not contenders:
            raise ValueError(f"segment_bytes: expected a multiple of {CHUNKS[0]}, got {segment_bytes}")
        times = interleave(self.gpu, contenders, 5)
        name = min(times, key=lambda each: times[each].median_us)
        return contenders[name], name

    def _launch(self, segments: Any, per_segment: int, chunk: int, threads: int, ctas: int) -> Any:
        chunks = per_segment * int(segments.size)
        grid = min(chunks, self.gpu.device.sm_count * ctas)
        numbers = [self.cupy.uint32(value) for value in (per_segment, chunks, chunk)]

        def launch() -> None:
            with self.stream:
                self.kernel((grid,), (threads,), (segments, *numbers, self.sink))

        return launch
