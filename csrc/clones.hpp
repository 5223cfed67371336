#pragma once

// One binary for every x86-64: the loader picks by processor, which needs glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FASTGAN_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef FASTGAN_CLONES
#define FASTGAN_CLONES
#endif

// For what clones share: compiled anew into each of them.
#define FASTGAN_INLINE __attribute__((always_inline)) inline
