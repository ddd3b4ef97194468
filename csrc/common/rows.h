// Storage of gradient rows: in memory, or in files that are read when needed.
#pragma once

#include <cstdint>

#ifndef _WIN32
#include <unistd.h>
#endif

#include "common/numbers.h"

namespace activedpo {

struct RowSource {
  const char* base;  // rows in memory, `stride` bytes apart; null if they are in files
  std::int64_t stride;
  const std::int32_t* descriptors;  // of the files, open for reading
  const std::int32_t* file_of_row;
  const std::int64_t* offset_of_row;  // bytes from the file's beginning
  std::int64_t row_bytes;

  bool in_memory() const { return base != nullptr; }

  // Returns the row's address, after reading it into `room` if it is in a file; null on failure.
  const char* get(std::int64_t row, char* room) const {
    if (in_memory()) return base + row * stride;
#ifdef _WIN32
    return nullptr;
#else
    const int file = descriptors[file_of_row[row]];
    std::int64_t done = 0;
    while (done < row_bytes) {
      const auto got = pread(file, room + done, static_cast<std::size_t>(row_bytes - done),
                             static_cast<off_t>(offset_of_row[row] + done));
      if (got <= 0) return nullptr;
      done += got;
    }
    return room;
#endif
  }
};

}  // namespace activedpo
