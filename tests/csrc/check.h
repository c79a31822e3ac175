// Assertions of the C++ tests: print and count, exit code at the end.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition, ...)                             \
  do {                                                    \
    if (!(condition)) {                                   \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                           \
      std::printf("\n");                                  \
      ++failures();                                       \
    }                                                     \
  } while (0)

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, failures() == 0 ? "ok" : "FAILED");
  return failures() == 0 ? 0 : 1;
}
