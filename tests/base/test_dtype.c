/* Number formats: names, and exact rounding at every value of the 16-bit formats. */
#include "base/dtype.h"

#include <math.h>
#include <stdlib.h>

#include "support/support.h"

static void test_names(void **state) {
    (void)state;
    for (int t = 0; t < DT_COUNT; t++) {
        enum dtype parsed = DT_COUNT;
        assert_in_range(dtype_size((enum dtype)t), 1, 8);
        assert_true(dtype_parse(dtype_name((enum dtype)t), &parsed));
        assert_int_equal(parsed, t);
        assert_true(dtype_parse(dtype_safetensors_name((enum dtype)t), &parsed));
        assert_int_equal(parsed, t);
    }
    enum dtype t = DT_I8;
    assert_true(dtype_parse("bfloat16", &t) && t == DT_BF16);
    assert_true(dtype_parse("float32", &t) && t == DT_F32);
    assert_true(dtype_parse("float16", &t) && t == DT_F16);
    assert_false(dtype_parse("float", &t) || dtype_parse("", &t) || dtype_parse(NULL, &t));
    assert_int_equal(dtype_size(DT_COUNT), 0);
    assert_string_equal(dtype_safetensors_name(DT_BF16), "BF16");
    assert_string_equal(dtype_name(DT_F32), "fp32");
}

static void test_known_values(void **state) {
    (void)state;
    assert_true(f16_to_f32(0x3c00) == 1.0f && f16_to_f32(0xc000) == -2.0f);
    assert_true(f16_to_f32(0x7bff) == 65504.0f && f16_to_f32(0x0001) == 0x1p-24f);
    assert_true(f16_to_f32(0x0400) == 0x1p-14f && isinf(f16_to_f32(0xfc00)));
    assert_true(bf16_to_f32(0x3f80) == 1.0f && bf16_to_f32(0x4049) == 3.140625f);
    assert_int_equal(f32_to_f16(0.1f), 0x2e66);
    assert_int_equal(f32_to_bf16(0.1f), 0x3dcd);
    assert_int_equal(f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(f32_to_f16(-0.0f), 0x8000);
    assert_int_equal(f32_to_f16(0x1p-25f), 0); /* half the least subnormal: to even */
    assert_int_equal(f32_to_f16(0x1.000002p-25f), 1);
}

/* Walks all neighbours a < b of a 16-bit format: a converts to itself, their midpoint to the even
 * one, and the fp32 and fp64 values next to the midpoint to the nearer one. */
static void check_rounding(enum dtype type, uint16_t infinity) {
    for (unsigned sign = 0; sign <= 0x8000u; sign += 0x8000u) {
        for (unsigned a = 0; a + 1 < infinity; a++) {
            uint16_t h[2] = {(uint16_t)(sign | a), (uint16_t)(sign | (a + 1))}, got[7];
            float f[2];
            dtype_convert(f, DT_F32, h, type, 2);
            double middle = ((double)f[0] + (double)f[1]) / 2;
            double values[7] = {f[0], middle, f[1]};
            values[3] = nextafter(middle, f[0]); /* differ from middle beyond fp32's precision: */
            values[4] = nextafter(middle, f[1]); /* rounding twice would get these wrong */
            values[5] = nextafterf((float)middle, f[0]);
            values[6] = nextafterf((float)middle, f[1]);
            uint16_t even = h[0] & 1 ? h[1] : h[0];
            const uint16_t want[7] = {h[0], even, h[1], h[0], h[1], h[0], h[1]};
            dtype_convert(got, type, values, DT_F64, 7);
            for (int i = 0; i < 7; i++)
                assert_int_equal(got[i], want[i]);
            if ((double)(float)middle != middle) /* of the least bf16s: no fp32 lies between */
                continue;
            float narrow[7];
            dtype_convert(narrow, DT_F32, values, DT_F64, 7);
            narrow[3] = narrow[4] = (float)middle;
            dtype_convert(got, type, narrow, DT_F32, 7);
            for (int i = 0; i < 7; i++)
                assert_int_equal(got[i], i == 3 || i == 4 ? even : want[i]);
        }
    }
    /* NaNs stay NaNs of the same sign. */
    for (unsigned x = infinity + 1u; x < 0x8000u; x++) {
        uint16_t h = (uint16_t)x, back;
        float f;
        dtype_convert(&f, DT_F32, &h, type, 1);
        assert_true(isnan(f));
        dtype_convert(&back, type, &f, DT_F32, 1);
        assert_true(back > infinity && back < 0x8000u);
    }
}

static void test_f16_rounding(void **state) {
    (void)state;
    check_rounding(DT_F16, 0x7c00);
}

static void test_bf16_rounding(void **state) {
    (void)state;
    check_rounding(DT_BF16, 0x7f80);
}

static void test_convert(void **state) {
    (void)state;
    const double extreme[6] = {1e300, -1e300, 1e-300, NAN, 0x1p-149, -0.0};
    float f[6];
    uint16_t h[6];
    double back[6];
    dtype_convert(f, DT_F32, extreme, DT_F64, 6);
    assert_true(isinf(f[0]) && isinf(f[1]) && f[2] == 0 && isnan(f[3]) && signbit(f[5]));
    dtype_convert(h, DT_F16, extreme, DT_F64, 6);
    assert_int_equal(h[0], 0x7c00);
    assert_int_equal(h[1], 0xfc00);
    dtype_convert(h, DT_BF16, extreme, DT_F64, 6);
    assert_int_equal(h[0], 0x7f80);
    dtype_convert(back, DT_F64, f, DT_F32, 6);
    assert_true(back[4] == 0x1p-149);
    const uint16_t one = 0x3c00;
    uint16_t bf;
    dtype_convert(&bf, DT_BF16, &one, DT_F16, 1);
    assert_int_equal(bf, 0x3f80);
    dtype_convert(f, DT_F32, f, DT_F32, 6); /* the same buffer */
    dtype_convert(NULL, DT_F32, NULL, DT_F32, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),        cmocka_unit_test(test_known_values),
        cmocka_unit_test(test_f16_rounding), cmocka_unit_test(test_bf16_rounding),
        cmocka_unit_test(test_convert),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
