// CHECK and CHECK_THROWS: print the place and leave with 1. Not assert(), which a Release build
// drops.
#pragma once

#include <cstdlib>
#include <iostream>
#include <string>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::cerr << __FILE__ << ":" << __LINE__ << ": not true: " #condition << "\n"; \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// The statement throws exactly this kind of exception, and its message holds the fragment.
#define CHECK_THROWS(statement, Exception, fragment)                                              \
  do {                                                                                            \
    bool thrown = false;                                                                          \
    try {                                                                                         \
      statement;                                                                                  \
    } catch (const Exception& error) {                                                            \
      thrown = true;                                                                              \
      if (std::string(error.what()).find(fragment) == std::string::npos) {                        \
        std::cerr << __FILE__ << ":" << __LINE__ << ": message: " << error.what() << "\n";        \
        std::exit(1);                                                                             \
      }                                                                                           \
    }                                                                                             \
    if (!thrown) {                                                                                \
      std::cerr << __FILE__ << ":" << __LINE__ << ": no " #Exception " from " #statement << "\n"; \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (false)
