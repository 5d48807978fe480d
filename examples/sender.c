/* A camera in C: ten frames over the native protocol (docs/wire.md), encrypted by CURVE, each answer printed.
 *
 *   cc -std=c11 -Wall -Wextra -O2 -o sender examples/sender.c -lzmq
 *   ./sender keys/cam1.peer.yaml tcp://127.0.0.1:5550 solar cam1
 *
 * The key file is made by: inspectd keygen peer cam1 --role camera --topic frame/solar/cam1
 * Debian: apt install libzmq3-dev (4.3.4 and newer have been tried). Ends with 0 where every frame was accepted.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

enum { HEIGHT = 64, WIDTH = 64, FRAMES = 10, KEY = 40, TIMEOUT_MS = 5000 };

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "sender: %s: %s\n", what, why);
    exit(1);
}

static void check(int result, const char *what)
{
    if (result < 0)
        fail(what, zmq_strerror(zmq_errno()));
}

/* The 40 characters behind "name: " in a key file, with or without quotes, and a zero. */
static void read_key(const char *path, const char *name, char key[KEY + 1])
{
    char line[256];
    FILE *file = fopen(path, "r");
    if (file == NULL)
        fail(path, strerror(errno));
    while (fgets(line, sizeof line, file) != NULL) {
        size_t length = strlen(name);
        if (strncmp(line, name, length) != 0 || line[length] != ':')
            continue;
        const char *value = line + length + 1;
        value += strspn(value, " '\"");
        if (strlen(value) >= KEY) {
            memcpy(key, value, KEY);
            key[KEY] = '\0';
            fclose(file);
            return;
        }
    }
    fclose(file);
    fail(path, "is no key file of a peer; make one with: inspectd keygen peer NAME --role camera");
}

static void set_key(void *socket, int option, const char *path, const char *name)
{
    char key[KEY + 1];
    read_key(path, name, key);
    check(zmq_setsockopt(socket, option, key, sizeof key), name);
}

static void set(void *socket, int option, int value)
{
    check(zmq_setsockopt(socket, option, &value, sizeof value), "zmq_setsockopt");
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void send_frame(void *socket, const char *topic, const char *epoch, int seq, const uint8_t *pixels)
{
    char header[512];
    int length = snprintf(header, sizeof header,
                          "{\"v\":1,\"epoch\":\"%s\",\"seq\":%d,\"partId\":\"part-%d\",\"capturedNs\":%" PRId64
                          ",\"encoding\":\"raw\",\"shape\":[%d,%d],\"pixelFormat\":\"Mono8\"}",
                          epoch, seq, seq, now_ns(), HEIGHT, WIDTH);
    if (length < 0 || (size_t)length >= sizeof header)
        fail("header", "is too long");
    check(zmq_send(socket, topic, strlen(topic), ZMQ_SNDMORE), "no daemon takes the frame");
    check(zmq_send(socket, header, (size_t)length, ZMQ_SNDMORE), "zmq_send");
    check(zmq_send(socket, pixels, HEIGHT * WIDTH, 0), "zmq_send");
}

/* Print the answer, [topic][JSON]; whether it says accepted. */
static int hear_answer(void *socket)
{
    char text[4096] = "";
    int more = 1;
    size_t size = sizeof more;
    while (more) { /* the last part is the JSON */
        int length = zmq_recv(socket, text, sizeof text - 1, 0);
        check(length, "no answer");
        text[(size_t)length < sizeof text ? (size_t)length : sizeof text - 1] = '\0';
        check(zmq_getsockopt(socket, ZMQ_RCVMORE, &more, &size), "zmq_getsockopt");
    }
    puts(text);
    return strstr(text, "\"status\":\"accepted\"") != NULL;
}

int main(int count, char **arguments)
{
    if (count != 5) {
        fprintf(stderr, "usage: %s KEYFILE tcp://HOST:PORT LINE CAMERA\n", arguments[0]);
        return 64;
    }
    void *context = zmq_ctx_new();
    void *socket = zmq_socket(context, ZMQ_DEALER);
    set_key(socket, ZMQ_CURVE_PUBLICKEY, arguments[1], "publicKey");
    set_key(socket, ZMQ_CURVE_SECRETKEY, arguments[1], "secretKey");
    set_key(socket, ZMQ_CURVE_SERVERKEY, arguments[1], "serverKey");
    set(socket, ZMQ_IMMEDIATE, 1); /* no frame waits here for a daemon that is away: it would show another part */
    set(socket, ZMQ_SNDTIMEO, TIMEOUT_MS);
    set(socket, ZMQ_RCVTIMEO, TIMEOUT_MS);
    set(socket, ZMQ_LINGER, 0);
    set(socket, ZMQ_TCP_KEEPALIVE, 1); /* not ZMQ_HEARTBEAT_IVL: docs/wire.md says why */
    check(zmq_connect(socket, arguments[2]), arguments[2]);

    char topic[256], epoch[64];
    if (snprintf(topic, sizeof topic, "frame/%s/%s", arguments[3], arguments[4]) >= (int)sizeof topic)
        fail("topic", "has at most 255 characters");
    /* A new one with each start of the camera. */
    snprintf(epoch, sizeof epoch, "%" PRIx64 "-%ld", (uint64_t)now_ns(), (long)getpid());

    static uint8_t pixels[HEIGHT * WIDTH];
    int accepted = 0;
    for (int seq = 0; seq < FRAMES; seq++) {
        memset(pixels, 128, sizeof pixels); /* the camera's image goes here */
        send_frame(socket, topic, epoch, seq, pixels);
        accepted += hear_answer(socket);
    }
    zmq_close(socket);
    zmq_ctx_term(context);
    return accepted == FRAMES ? 0 : 1;
}
