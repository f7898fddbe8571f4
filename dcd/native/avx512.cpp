// What Python calls: the addresses of functions, which stand in `maps.h` and `matrices.h`.

#include "maps.h"
#include "matrices.h"

#define EXPORT(NAME) extern "C" __attribute__((visibility("default"))) const auto dcd_##NAME = &dcd::NAME;
#define EXPORT_FOR_MAPS(NAME)                                                                                     \
    extern "C" __attribute__((visibility("default"))) const auto dcd_##NAME##_float32 = &dcd::NAME<dcd::Float32>; \
    extern "C" __attribute__((visibility("default"))) const auto dcd_##NAME##_bfloat16 = &dcd::NAME<dcd::BFloat16>;

EXPORT(coefficients)
EXPORT(coefficients_backward)
EXPORT(fuse)
EXPORT(fuse_backward)
EXPORT_FOR_MAPS(read_latent)
EXPORT_FOR_MAPS(narrow_sums)
EXPORT_FOR_MAPS(combine)
EXPORT_FOR_MAPS(combine_backward)
EXPORT_FOR_MAPS(latent_gradient)
EXPORT_FOR_MAPS(add_input_gradient)
EXPORT_FOR_MAPS(form_kernels)
EXPORT_FOR_MAPS(form_kernels_backward)
