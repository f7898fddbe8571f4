// Runs `native.cpp` on one input: a `Choice`, then the bytes of an image. `run.py` compiles it by clang as a fuzzer;
// with ALONE defined it is a program for valgrind, whose command line names the files with the inputs.

#ifdef __clang__  // GCC has this function, clang does not
#include <cstdint>
template <class Bytes>
static Bytes __builtin_shuffle(Bytes from, Bytes order) {
    Bytes shuffled;
    for (unsigned i = 0; i < sizeof from; i++) shuffled[i] = from[order[i]];
    return shuffled;
}
#endif

#include "../../pipelines/native/native.cpp"

#include <cstdlib>
#include <memory>

struct Choice {  // as in inputs.py; 16 bytes
    uint8_t flags, side, count, unused;
    uint16_t height, width, top, left, box_h, box_w;  // each is brought into its range
};
enum { EXACT = 1, FLIP = 2, FLOATS = 4, RAW = 8, WRONG_SIZE = 16, WRONG_CHECKSUM = 32 };

static const uint64_t MOST_PIXELS_HERE = 1 << 20;  // larger images take longer, but reach no other code

// Reads all bytes. valgrind reports a branch that depends on bytes that were never written, as the one below then does.
static void use(const void *bytes, size_t size) {
    if (dcd_xxh64(static_cast<const uint8_t *>(bytes), size) == 1) abort();
}

static void claim(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "not so: %s\n", what);
    abort();
}

// The memory for the images has exactly their size, so that a sanitizer sees each byte that is written behind them.
template <class Component>
static void render(const Choice &choice, const uint8_t *data, uint64_t size, int height, int width) {
    const int side = 1 + choice.side % 64, count = 1 + choice.count % 2;
    Job job = {data, size, dcd_xxh64(data, size), height, width, 0, 0, 1 + choice.box_h % height,
               1 + choice.box_w % width, uint8_t(bool(choice.flags & RAW)), uint8_t(bool(choice.flags & FLIP)), 1, {}};
    job.top = choice.top % (height - job.box_h + 1), job.left = choice.left % (width - job.box_w + 1);
    if (choice.flags & WRONG_CHECKSUM) job.checksum++;
    const Job jobs[2] = {job, job};
    const float scale[3] = {0.5f, 1, 2}, shift[3] = {0, -1, 1};
    const size_t components = size_t(count) * side * side * 3;
    std::unique_ptr<Component[]> images(new Component[components]);
    char message[MESSAGE];
    const int64_t failed = dcd_render(jobs, count, count, side, sizeof(Component) == sizeof(float), scale, shift,
                                      choice.flags & EXACT, images.get(), message);
    claim(failed < count, "the place of a failure is one of the batch");
    claim(failed < 0 || memchr(message, 0, MESSAGE), "a message ends");
    claim(failed >= 0 || !(choice.flags & WRONG_CHECKSUM), "bytes that have changed are refused");
    if (failed < 0) use(images.get(), components * sizeof(Component));
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length) {
    Choice choice;
    if (length < sizeof choice) return 0;
    memcpy(&choice, input, sizeof choice);
    const uint8_t *data = input + sizeof choice;
    const uint64_t size = length - sizeof choice;
    use(data, size);

    int32_t found[2];
    char message[MESSAGE], other_message[MESSAGE];
    const bool has_size = !dcd_jpeg_size(data, size, found, message);
    const uint64_t pixels = has_size ? uint64_t(found[0]) * found[1] : 0;
    claim(!has_size || (found[0] > 0 && found[1] > 0), "an image has pixels");
    const bool is_whole = !dcd_decode(data, size, nullptr, false, message);
    claim(has_size || !is_whole, "a file without a size is damaged");
    if (has_size && pixels <= MOST_PIXELS_HERE) {
        std::unique_ptr<uint8_t[]> image(new uint8_t[pixels * 3]);
        const bool decodes = !dcd_decode(data, size, image.get(), false, other_message);
        claim(decodes == is_whole, "a check says what decoding says");
        claim(decodes || !strcmp(message, other_message), "with the same reason");
        if (decodes) use(image.get(), pixels * 3);
        std::vector<uint8_t> plain(pixels * 3);
        const bool plain_decodes = !dcd_decode(data, size, plain.data(), true, message);
        claim(decodes == plain_decodes, "libjpeg alone says the same");
        claim(decodes || !strcmp(other_message, message), "with the same reason as libjpeg");
        claim(!decodes || !memcmp(image.get(), plain.data(), pixels * 3), "and decodes to the same pixels");
    }

    const bool wrong = !has_size || choice.flags & (WRONG_SIZE | RAW);
    const int height = wrong ? 1 + choice.height % 65535 : found[0], width = wrong ? 1 + choice.width % 65535 : found[1];
    if (uint64_t(height) * width > MOST_PIXELS_HERE) return 0;
    if (choice.flags & FLOATS)
        render<float>(choice, data, size, height, width);
    else
        render<uint8_t>(choice, data, size, height, width);
    return 0;
}

#ifdef ALONE
int main(int count, char **paths) {
    for (int i = 1; i < count; i++) {
        fprintf(stderr, "%s\n", paths[i]);
        std::vector<uint8_t> bytes;
        FILE *file = fopen(paths[i], "rb");
        if (!file) return perror(paths[i]), 2;
        for (int byte; (byte = fgetc(file)) != EOF;) bytes.push_back(byte);
        fclose(file);
        std::unique_ptr<uint8_t[]> exact(new uint8_t[bytes.size()]);
        std::copy(bytes.begin(), bytes.end(), exact.get());
        LLVMFuzzerTestOneInput(exact.get(), bytes.size());
    }
    return 0;
}
#endif
