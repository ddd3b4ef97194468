// The greedy selection of ../greedy.h by a resident grid.
#pragma once

#include "../greedy.h"
#include "launch.h"

namespace activedpo {

// Starts the selection on the stream given, without waiting for it. `room`: as many bytes of the
// device as GreedyRoom::lay_out says, with any content; all addresses are the device's. Throws what
// errors.h says, also where the device cannot hold a grid whose blocks wait for each other.
template <typename T>
void greedy_select(const GreedyProblem& problem, char* room, const Target& target);

}  // namespace activedpo
