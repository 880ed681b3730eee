#pragma once

#include <cstddef>

// On the serial line.
void say(const char* text);
void say(long number);

// Frees all memory at once.
void forget_all();
