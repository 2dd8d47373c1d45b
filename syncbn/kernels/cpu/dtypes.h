/* passes.h in every dtype, for the kind of processor that KIND says. */

#define PASTED(name, type, kind) name##_##type##_##kind
#define PASTE(name, type, kind) PASTED(name, type, kind)
#define OF(name) PASTE(name, TYPE, KIND)

#define TYPE float32
#define DTYPE FLOAT32_
#define STORED float
#define ARITHMETIC float
#include "passes.h"
#include "forget.h"

#define TYPE float64
#define DTYPE FLOAT64_
#define STORED double
#define ARITHMETIC double
#include "passes.h"
#include "forget.h"

#define TYPE bfloat16
#define DTYPE BFLOAT16_
#define STORED uint16_t
#define ARITHMETIC float
#include "passes.h"
#include "forget.h"

#define TYPE float16
#define DTYPE FLOAT16_
#define STORED uint16_t
#define ARITHMETIC float
#include "passes.h"
#include "forget.h"

static const passes *const PASTE(passes, of, KIND)[DTYPES] = {
    [FLOAT32] = &PASTE(passes, float32, KIND),
    [FLOAT64] = &PASTE(passes, float64, KIND),
    [BFLOAT16] = &PASTE(passes, bfloat16, KIND),
    [FLOAT16] = &PASTE(passes, float16, KIND),
};

#undef OF
#undef PASTE
#undef PASTED
#undef KIND
