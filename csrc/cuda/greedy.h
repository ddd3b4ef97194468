// The greedy selection of greedy/ on a resident grid.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "greedy/problem.h"

namespace activedpo {

// Starts the picks begin..end-1 on the given stream, without waiting for them; those before have been
// started there, with the same problem and room. `room`: device memory of the
// size that GreedyRoom::lay_out returns, uninitialized; all addresses are device addresses. Throws
// as in errors.h, also if the device cannot hold a grid whose blocks wait for each other.
template <typename T>
void greedy_select(const GreedyProblem& problem, char* room, std::int64_t begin, std::int64_t end,
                   const Target& target);

}  // namespace activedpo
