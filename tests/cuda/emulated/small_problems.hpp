// What run/run_program.hpp does with a grouped kernel on a GPU, on few and small problems.
#pragma once

#include "run/run_program.hpp"

namespace run {

/// A few ragged groups, with scales and without. Prints one line; returns the exit status. argv[1]:
/// the seed.
template <class Kernel, Fusion kFusion>
int run_small(Options const& options, int argc, char** argv) {
  uint64_t const seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 0;
  int sm_count = 0;
  check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, 0),
             "cudaDeviceGetAttribute");
  Random random(seed);
  Traits const traits = traits_of<Kernel, kFusion>(options);
  int const tm = traits.tile_m, tn = traits.tile_n, tk = traits.tile_k;
  Verdict total;
  std::string failure;
  for (bool plain : {false, true}) {
    Problem problem;
    // Extents are drawn again until they are few tiles: an edge on every side, and an empty group.
    for (int tiles = 1000; tiles > 24;) {
      Traits narrow = traits;
      narrow.tile_m = tm / 2;
      narrow.tile_n = std::max(tn / 2, 8);
      narrow.tile_k = 32;
      problem = random_problem(random, narrow, Family::kRagged, plain);
      tiles = 0;
      for (Extents const& group : problem.extents) {
        tiles += (group.m + tm - 1) / tm * ((group.n + tn - 1) / tn) * ((group.k + tk - 1) / tk);
      }
    }
    std::string const why = run_problem<Kernel, kFusion>(problem, plain, false, SM12X_BIAS_FLOAT32,
                                                         sm_count, nullptr, total);
    if (!why.empty() && failure.empty()) {
      failure = std::string(plain ? "plain: " : "") + why;
    }
  }
  if (total.elements == 0) {
    failure = "no element was checked";
  }
  std::printf("%s: %s, %lld elements, worst error %.3f of its bound, %d stages%s%s\n", options.name,
              failure.empty() ? "ok" : "FAILED", (long long)total.elements, total.worst,
              int(Kernel::CollectiveMainloop::DispatchPolicy::Stages), failure.empty() ? "" : "; ",
              failure.c_str());
  return failure.empty() ? 0 : 1;
}

}  // namespace run
