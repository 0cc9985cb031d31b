/* A line between two network namespaces: delay, jitter, rate, loss, cuts and resets.
 *
 * Run as: wan CONTROL_FD NETNS_FILE NETNS_FILE DEVICE
 *
 * It makes a TUN device of that name in both namespaces and carries IP packets between the two;
 * addresses and routes are the caller's affair. CONTROL_FD is a SOCK_SEQPACKET socket: one
 * request is one packet, so is its answer. When the other end of it closes, the line ends.
 *
 *   set NAME NUMBER ...   delay_ns jitter_ns rate_bps queue_bytes loss reorder cut
 *   reset PORT            all TCP flows, where PORT is 0
 *   figures               a JSON object
 *
 * The kernel hands over up to 64 KiB of one TCP flow at a time ("segmentation offload"), with a
 * note how long the packets on the line are to be. Rate, queue and loss are reckoned for those;
 * only where some of them are lost is the rest cut out of the whole. That is what makes it fast.
 *
 * One thread: two cores are shared with what is measured, and nothing needs a lock.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LARGE (65536 + 64)
#define SMALL 2048
/* What one direction may hold: 50 ms of 10 Gbit/s are 63 MB. */
#define HELD_BYTES (256u << 20)
#define HELD_PACKETS (1u << 17)
#define BATCH 64
/* How much of what the line could have carried while this program did not run is made up for. */
#define BUCKET_NS 2000000
#define CONTROL_NS 1000000
/* Flows are kept in buckets; the one not seen for longest gives way. */
#define BUCKETS 4096
#define WAYS 8

typedef int64_t nanoseconds;

struct flow {
    uint32_t address[2]; /* as the sender of direction 0 and of direction 1 */
    uint16_t port[2];
    bool used, reset;
    bool known[2]; /* something was seen from this end */
    uint32_t sent[2]; /* end of what this end sent */
    bool answered[2];
    uint32_t acked[2]; /* what this end said that it has */
    bool got[2];
    uint32_t delivered[2]; /* end of what was handed to this end */
    uint64_t birth, seen;
};

struct packet {
    struct packet *next;
    nanoseconds due;
    uint64_t number;
    struct flow *flow;
    uint64_t birth;
    uint32_t length; /* with the header of virtio */
    uint32_t units;
    uint32_t room;
    uint8_t data[];
};

struct counters {
    uint64_t packets, bytes, lost, tail_dropped, cut_dropped, reset_dropped, memory_dropped,
        refused, queue_peak_bytes, held_peak_bytes;
    nanoseconds late;
};

struct direction {
    int in, out;
    nanoseconds free_at; /* when the line has sent what was put on it */
    nanoseconds last_due;
    struct packet **heap;
    uint32_t held;
    uint64_t held_bytes;
    uint64_t number;
    struct counters count;
};

static struct {
    nanoseconds delay, jitter;
    double ns_per_byte;
    uint64_t queue_bytes;
    double loss;
    bool reorder, cut;
} line;

static struct direction directions[2];
static struct flow flows[BUCKETS][WAYS];
static uint64_t births;
static struct packet *free_small, *free_large;
static uint64_t chance = 0x9e3779b97f4a7c15u;
static uint64_t resets_sent;

static void die(const char *what)
{
    fprintf(stderr, "wan: %s: %s\n", what, strerror(errno));
    exit(1);
}

static nanoseconds now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* A number in [0, 1): xorshift64*. */
static double random_number(void)
{
    chance ^= chance >> 12;
    chance ^= chance << 25;
    chance ^= chance >> 27;
    return (double)((chance * 0x2545f4914f6cdd1du) >> 11) / 9007199254740992.0;
}

/* ---- memory ---------------------------------------------------------------------------- */

static struct packet *take(uint32_t room)
{
    struct packet **list = room <= SMALL ? &free_small : &free_large;
    struct packet *packet = *list;
    if (packet != NULL) {
        *list = packet->next;
        return packet;
    }
    room = room <= SMALL ? SMALL : LARGE;
    packet = malloc(sizeof *packet + room);
    if (packet == NULL)
        die("memory");
    packet->room = room;
    return packet;
}

static void give_back(struct packet *packet)
{
    struct packet **list = packet->room == SMALL ? &free_small : &free_large;
    packet->next = *list;
    *list = packet;
}

/* ---- packets on their way, the next one first -------------------------------------------- */

static bool sooner(const struct packet *one, const struct packet *other)
{
    return one->due != other->due ? one->due < other->due : one->number < other->number;
}

static void hold(struct direction *direction, struct packet *packet)
{
    struct packet **heap = direction->heap;
    uint32_t at = direction->held++;
    packet->number = direction->number++;
    direction->held_bytes += packet->room;
    if (direction->held_bytes > direction->count.held_peak_bytes)
        direction->count.held_peak_bytes = direction->held_bytes;
    while (at > 0 && sooner(packet, heap[(at - 1) / 2])) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = packet;
}

static struct packet *let_go(struct direction *direction)
{
    struct packet **heap = direction->heap;
    struct packet *first = heap[0];
    struct packet *last = heap[--direction->held];
    uint32_t at = 0;
    direction->held_bytes -= first->room;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= direction->held)
            break;
        if (child + 1 < direction->held && sooner(heap[child + 1], heap[child]))
            child++;
        if (!sooner(heap[child], last))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return first;
}

/* ---- headers ----------------------------------------------------------------------------- */

static struct virtio_net_hdr *note_of(struct packet *packet)
{
    return (struct virtio_net_hdr *)packet->data;
}

static struct iphdr *ip_of(struct packet *packet)
{
    return (struct iphdr *)(packet->data + sizeof(struct virtio_net_hdr));
}

static uint32_t ip_length(const struct packet *packet)
{
    return packet->length - sizeof(struct virtio_net_hdr);
}

/* The TCP header, where the packet is an unbroken one of TCP over IPv4. */
static struct tcphdr *tcp_of(struct packet *packet)
{
    struct iphdr *ip = ip_of(packet);
    uint32_t length = ip_length(packet);
    if (length < sizeof *ip || ip->version != 4 || ip->protocol != IPPROTO_TCP ||
        (ntohs(ip->frag_off) & 0x1fff) != 0 || ip->ihl < 5 ||
        length < ip->ihl * 4u + sizeof(struct tcphdr))
        return NULL;
    struct tcphdr *tcp = (struct tcphdr *)((uint8_t *)ip + ip->ihl * 4);
    if (tcp->doff < 5 || length < ip->ihl * 4u + tcp->doff * 4u)
        return NULL;
    return tcp;
}

static uint32_t headers_length(struct packet *packet, const struct tcphdr *tcp)
{
    return (uint32_t)((const uint8_t *)tcp - (const uint8_t *)ip_of(packet)) + tcp->doff * 4u;
}

static uint32_t sum(const void *data, uint32_t length, uint32_t so_far)
{
    const uint8_t *byte = data;
    for (; length > 1; length -= 2, byte += 2)
        so_far += (uint32_t)byte[0] << 8 | byte[1];
    if (length)
        so_far += (uint32_t)byte[0] << 8;
    return so_far;
}

static uint16_t folded(uint32_t value)
{
    while (value >> 16)
        value = (value & 0xffff) + (value >> 16);
    return htons((uint16_t)value);
}

static uint32_t pseudo_sum(const struct iphdr *ip, uint32_t tcp_length)
{
    return sum(&ip->saddr, 8, IPPROTO_TCP + tcp_length);
}

static void finish_ip(struct iphdr *ip, uint32_t length)
{
    ip->tot_len = htons((uint16_t)length);
    ip->check = 0;
    ip->check = (uint16_t)~folded(sum(ip, ip->ihl * 4u, 0));
}

/* How many packets of the line this is, and how long each one's payload is. */
static uint32_t units_of(struct packet *packet, uint32_t *each)
{
    struct virtio_net_hdr *note = note_of(packet);
    struct tcphdr *tcp;
    *each = 0;
    if ((note->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) != VIRTIO_NET_HDR_GSO_TCPV4 ||
        note->gso_size == 0 || (tcp = tcp_of(packet)) == NULL)
        return 1;
    uint32_t payload = ip_length(packet) - headers_length(packet, tcp);
    if (payload <= note->gso_size)
        return 1;
    *each = note->gso_size;
    return (payload + *each - 1) / *each;
}

static uint64_t line_bytes(struct packet *packet, uint32_t units)
{
    if (units == 1)
        return ip_length(packet);
    return ip_length(packet) + (uint64_t)(units - 1) * headers_length(packet, tcp_of(packet));
}

/* Packets first to first + units - 1 of those that the whole stands for. */
static struct packet *cut_out(struct packet *whole, uint32_t each, uint32_t first, uint32_t units)
{
    struct tcphdr *tcp = tcp_of(whole);
    uint32_t headers = headers_length(whole, tcp);
    uint32_t payload = ip_length(whole) - headers;
    uint32_t from = first * each;
    uint32_t bytes = units * each < payload - from ? units * each : payload - from;
    uint32_t note_bytes = sizeof(struct virtio_net_hdr);
    struct packet *part = take(note_bytes + headers + bytes);
    memcpy(part->data, whole->data, note_bytes + headers);
    memcpy(part->data + note_bytes + headers, whole->data + note_bytes + headers + from, bytes);
    part->length = note_bytes + headers + bytes;
    part->units = units;
    part->flow = whole->flow;
    part->birth = whole->birth;
    struct iphdr *ip = ip_of(part);
    ip->id = htons((uint16_t)(ntohs(ip->id) + first));
    finish_ip(ip, headers + bytes);
    struct tcphdr *out = tcp_of(part);
    out->seq = htonl(ntohl(tcp->seq) + from);
    if (first > 0)
        out->res2 &= 1; /* "window reduced" stands in the first packet only */
    if (from + bytes < payload)
        out->fin = out->psh = 0;
    /* A whole of several packets comes without a checksum: so does the part of it. */
    out->check = folded(pseudo_sum(ip, out->doff * 4u + bytes));
    if (units == 1) {
        note_of(part)->gso_type = VIRTIO_NET_HDR_GSO_NONE;
        note_of(part)->gso_size = 0;
    }
    return part;
}

/* ---- flows ------------------------------------------------------------------------------- */

static struct flow *flow_of(struct packet *packet, struct tcphdr *tcp, int way)
{
    const struct iphdr *ip = ip_of(packet);
    uint32_t address[2];
    uint16_t port[2];
    address[way] = ip->saddr;
    address[!way] = ip->daddr;
    port[way] = tcp->source;
    port[!way] = tcp->dest;
    uint64_t hash = ((uint64_t)address[0] << 32 | address[1]) * 0x9e3779b97f4a7c15u;
    hash ^= ((uint64_t)port[0] << 16 | port[1]) * 0xc2b2ae3d27d4eb4fu;
    struct flow *bucket = flows[(hash >> 29) % BUCKETS], *flow = NULL, *oldest = bucket;
    for (int at = 0; at < WAYS && flow == NULL; at++) {
        struct flow *one = &bucket[at];
        if (one->used && memcmp(one->address, address, sizeof address) == 0 &&
            memcmp(one->port, port, sizeof port) == 0)
            flow = one;
        if (one->seen < oldest->seen)
            oldest = one;
    }
    if (flow == NULL || (tcp->syn && !tcp->ack)) {
        if (flow == NULL)
            flow = oldest;
        memset(flow, 0, sizeof *flow);
        memcpy(flow->address, address, sizeof address);
        memcpy(flow->port, port, sizeof port);
        flow->used = true;
        flow->birth = ++births;
    }
    flow->seen = ++births;
    return flow;
}

static uint32_t end_of(struct packet *packet, const struct tcphdr *tcp)
{
    return ntohl(tcp->seq) + ip_length(packet) - headers_length(packet, tcp) + tcp->syn + tcp->fin;
}

static bool after(uint32_t one, uint32_t other)
{
    return (int32_t)(one - other) > 0;
}

static void note_sent(struct flow *flow, struct packet *packet, const struct tcphdr *tcp, int way)
{
    uint32_t end = end_of(packet, tcp);
    if (!flow->known[way] || after(end, flow->sent[way]))
        flow->sent[way] = end;
    flow->known[way] = true;
    if (!tcp->ack)
        return;
    if (!flow->answered[way] || after(ntohl(tcp->ack_seq), flow->acked[way]))
        flow->acked[way] = ntohl(tcp->ack_seq);
    flow->answered[way] = true;
}

/* Hand one end of a flow a reset as if from the other. */
static void send_reset(const struct flow *flow, int end, uint32_t sequence)
{
    struct {
        struct virtio_net_hdr note;
        struct iphdr ip;
        struct tcphdr tcp;
    } __attribute__((packed)) reset;
    memset(&reset, 0, sizeof reset);
    struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP};
    ip.saddr = flow->address[!end];
    ip.daddr = flow->address[end];
    finish_ip(&ip, sizeof ip + sizeof(struct tcphdr));
    struct tcphdr tcp = {.doff = 5, .rst = 1, .ack = 1};
    tcp.source = flow->port[!end];
    tcp.dest = flow->port[end];
    tcp.seq = htonl(sequence);
    tcp.ack_seq = htonl(flow->sent[end]);
    tcp.check = (uint16_t)~folded(sum(&tcp, sizeof tcp, pseudo_sum(&ip, sizeof tcp)));
    reset.ip = ip;
    reset.tcp = tcp;
    /* What direction 0 reads comes from end 0, and direction 1 writes to it. */
    if (write(directions[end].in, &reset, sizeof reset) == (ssize_t)sizeof reset)
        resets_sent++;
}

/* A reset counts only with exactly the sequence number that its receiver expects next. That is
 * what it acknowledged last, or, where it has not said so yet, the end of what it was handed.
 * Whatever it may still send is answered too (see arrive), as is its doubt of a wrong number. */
static uint32_t reset_flows(uint16_t port)
{
    uint32_t count = 0;
    for (uint32_t at = 0; at < BUCKETS * WAYS; at++) {
        struct flow *flow = &flows[at / WAYS][at % WAYS];
        if (!flow->used || flow->reset ||
            (port != 0 && ntohs(flow->port[0]) != port && ntohs(flow->port[1]) != port))
            continue;
        flow->reset = true;
        count++;
        for (int end = 0; end < 2 && !line.cut; end++) {
            if (!flow->known[end])
                continue;
            send_reset(flow, end, flow->acked[end]);
            if (flow->got[end] && flow->delivered[end] != flow->acked[end])
                send_reset(flow, end, flow->delivered[end]);
        }
    }
    return count;
}

/* ---- the line ---------------------------------------------------------------------------- */

static void depart(struct direction *direction, struct packet *packet, nanoseconds due)
{
    if (direction->held == HELD_PACKETS || direction->held_bytes + packet->room > HELD_BYTES) {
        direction->count.memory_dropped += packet->units;
        give_back(packet);
        return;
    }
    packet->due = due;
    hold(direction, packet);
}

static uint64_t queue_now(const struct direction *direction, nanoseconds time)
{
    if (line.ns_per_byte <= 0 || direction->free_at <= time)
        return 0;
    return (uint64_t)((double)(direction->free_at - time) / line.ns_per_byte);
}

static nanoseconds due_of(struct direction *direction, nanoseconds sent)
{
    nanoseconds due = sent + line.delay;
    if (line.jitter > 0)
        due += (nanoseconds)(random_number() * (double)line.jitter);
    if (!line.reorder) {
        if (due < direction->last_due)
            due = direction->last_due;
        direction->last_due = due;
    }
    return due;
}

/* Put a packet, or those it stands for, on the line. */
static void enter(struct direction *direction, struct packet *packet, nanoseconds time)
{
    uint32_t each, units = units_of(packet, &each), fit = units;
    uint64_t bytes = line_bytes(packet, units);
    nanoseconds sent = time;
    if (line.ns_per_byte > 0) {
        uint64_t queued = queue_now(direction, time);
        if (queued + bytes > line.queue_bytes) {
            uint64_t room = queued < line.queue_bytes ? line.queue_bytes - queued : 0;
            fit = units == 1 ? 0 : (uint32_t)(room * units / bytes);
            direction->count.tail_dropped += units - fit;
            bytes = bytes * fit / units;
        }
        if (direction->free_at < time - BUCKET_NS)
            direction->free_at = time - BUCKET_NS;
        direction->free_at += (nanoseconds)((double)bytes * line.ns_per_byte);
        if (direction->free_at > time)
            sent = direction->free_at;
        uint64_t peak = queue_now(direction, time);
        if (peak > direction->count.queue_peak_bytes)
            direction->count.queue_peak_bytes = peak;
    }
    uint32_t first = 0;
    for (uint32_t at = 0; at <= fit && fit > 0; at++) {
        bool lost = at < fit && line.loss > 0 && random_number() < line.loss;
        if (at < fit && !lost)
            continue;
        direction->count.lost += lost;
        if (at > first) {
            if (at - first == units) {
                packet->units = units;
                depart(direction, packet, due_of(direction, sent));
                return;
            }
            depart(direction, cut_out(packet, each, first, at - first), due_of(direction, sent));
        }
        first = at + 1;
    }
    give_back(packet);
}

static void arrive(struct direction *direction, struct packet *packet, nanoseconds time)
{
    int way = (int)(direction - directions);
    struct tcphdr *tcp = tcp_of(packet);
    uint32_t each, units = units_of(packet, &each);
    packet->flow = NULL;
    if (line.cut) {
        direction->count.cut_dropped += units;
        give_back(packet);
        return;
    }
    if (tcp != NULL) {
        struct flow *flow = flow_of(packet, tcp, way);
        packet->flow = flow;
        packet->birth = flow->birth;
        note_sent(flow, packet, tcp, way);
        if (flow->reset) {
            direction->count.reset_dropped += units;
            if (!tcp->rst)
                send_reset(flow, way, tcp->ack ? ntohl(tcp->ack_seq) : 0);
            give_back(packet);
            return;
        }
    }
    enter(direction, packet, time);
}

static void deliver(struct direction *direction, struct packet *packet, nanoseconds time)
{
    int way = (int)(direction - directions);
    struct flow *flow = packet->flow;
    if (flow != NULL && flow->birth != packet->birth)
        flow = NULL;
    if (line.cut) {
        direction->count.cut_dropped += packet->units;
    } else if (flow != NULL && flow->reset) {
        direction->count.reset_dropped += packet->units;
    } else if (write(direction->out, packet->data, packet->length) < 0) {
        direction->count.refused += packet->units;
    } else {
        direction->count.packets += packet->units;
        direction->count.bytes += ip_length(packet);
        if (time - packet->due > direction->count.late)
            direction->count.late = time - packet->due;
        if (flow != NULL) {
            uint32_t end = end_of(packet, tcp_of(packet));
            if (!flow->got[!way] || after(end, flow->delivered[!way]))
                flow->delivered[!way] = end;
            flow->got[!way] = true;
        }
    }
    give_back(packet);
}

/* Read what came, write what is due; say if there was anything to do. */
static bool work(struct direction *direction)
{
    bool busy = false;
    for (int count = 0; count < BATCH; count++) {
        struct packet *packet = take(LARGE);
        ssize_t length = read(direction->in, packet->data, packet->room);
        if (length < (ssize_t)(sizeof(struct virtio_net_hdr) + sizeof(struct iphdr))) {
            give_back(packet);
            if (length < 0)
                break;
            continue;
        }
        busy = true;
        packet->length = (uint32_t)length;
        if (length <= SMALL) {
            struct packet *fitting = take(SMALL);
            memcpy(fitting->data, packet->data, (size_t)length);
            fitting->length = packet->length;
            give_back(packet);
            packet = fitting;
        }
        arrive(direction, packet, now());
    }
    nanoseconds time = now();
    while (direction->held > 0 && direction->heap[0]->due <= time) {
        busy = true;
        deliver(direction, let_go(direction), time);
    }
    return busy;
}

/* ---- control ----------------------------------------------------------------------------- */

static bool set_one(const char *name, double value)
{
    if (strcmp(name, "delay_ns") == 0)
        line.delay = (nanoseconds)value;
    else if (strcmp(name, "jitter_ns") == 0)
        line.jitter = (nanoseconds)value;
    else if (strcmp(name, "rate_bps") == 0)
        line.ns_per_byte = value > 0 ? 8e9 / value : 0;
    else if (strcmp(name, "queue_bytes") == 0)
        line.queue_bytes = (uint64_t)value;
    else if (strcmp(name, "loss") == 0)
        line.loss = value;
    else if (strcmp(name, "reorder") == 0)
        line.reorder = value != 0;
    else if (strcmp(name, "cut") == 0)
        line.cut = value != 0;
    else
        return false;
    return true;
}

static void set(char *words, char *answer, size_t room)
{
    nanoseconds time = now();
    uint64_t queued[2] = {queue_now(&directions[0], time), queue_now(&directions[1], time)};
    char *rest = words, *name, *value;
    while ((name = strtok_r(NULL, " ", &rest)) != NULL) {
        if ((value = strtok_r(NULL, " ", &rest)) == NULL || !set_one(name, atof(value))) {
            snprintf(answer, room, "error: cannot set %s", name);
            return;
        }
    }
    for (int way = 0; way < 2; way++) {
        /* What waits now leaves at the new rate, and no longer than the old delay holds up. */
        directions[way].free_at = time + (nanoseconds)((double)queued[way] * line.ns_per_byte);
        directions[way].last_due = 0;
    }
    snprintf(answer, room, "done");
}

static void tell(char *answer, size_t room)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    size_t at = (size_t)snprintf(
        answer, room, "{\"cpu_seconds\": %.3f, \"resets_sent\": %llu, \"directions\": [",
        (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
            (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6,
        (unsigned long long)resets_sent);
    for (int way = 0; way < 2; way++) {
        const struct direction *direction = &directions[way];
        const struct counters *count = &direction->count;
        at += (size_t)snprintf(
            answer + at, room - at,
            "%s{\"packets\": %llu, \"bytes\": %llu, \"lost\": %llu, \"tail_dropped\": %llu, "
            "\"cut_dropped\": %llu, \"reset_dropped\": %llu, \"memory_dropped\": %llu, "
            "\"refused\": %llu, \"queue_bytes\": %llu, \"queue_peak_bytes\": %llu, "
            "\"held_packets\": %u, \"held_bytes\": %llu, \"held_peak_bytes\": %llu, "
            "\"late_max_ms\": %.3f}",
            way ? ", " : "", (unsigned long long)count->packets, (unsigned long long)count->bytes,
            (unsigned long long)count->lost, (unsigned long long)count->tail_dropped,
            (unsigned long long)count->cut_dropped, (unsigned long long)count->reset_dropped,
            (unsigned long long)count->memory_dropped, (unsigned long long)count->refused,
            (unsigned long long)queue_now(direction, now()),
            (unsigned long long)count->queue_peak_bytes, direction->held,
            (unsigned long long)direction->held_bytes, (unsigned long long)count->held_peak_bytes,
            (double)count->late / 1e6);
    }
    snprintf(answer + at, room - at, "]}");
}

/* Answer one request; false when the other end is gone. */
static bool control(int socket)
{
    static char request[1024], answer[4096];
    ssize_t length = recv(socket, request, sizeof request - 1, MSG_DONTWAIT);
    if (length < 0)
        return errno == EAGAIN || errno == EINTR;
    if (length == 0)
        return false;
    request[length] = 0;
    char *rest, *word = strtok_r(request, " ", &rest);
    if (word != NULL && strcmp(word, "set") == 0)
        set(rest, answer, sizeof answer);
    else if (word != NULL && strcmp(word, "reset") == 0)
        snprintf(answer, sizeof answer, "%u", reset_flows((uint16_t)atoi(rest)));
    else if (word != NULL && strcmp(word, "figures") == 0)
        tell(answer, sizeof answer);
    else
        snprintf(answer, sizeof answer, "error: unknown request");
    return send(socket, answer, strlen(answer), MSG_NOSIGNAL) >= 0;
}

/* ---- start ------------------------------------------------------------------------------- */

static int device_in(const char *namespace, const char *name)
{
    int file = open(namespace, O_RDONLY | O_CLOEXEC);
    if (file < 0 || setns(file, CLONE_NEWNET) < 0)
        die(namespace);
    close(file);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0)
        die("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
    if (ioctl(device, TUNSETIFF, &request) < 0)
        die(name);
    if (ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN) < 0)
        die("TUNSETOFFLOAD");
    return device;
}

int main(int count, char **words)
{
    if (count != 5) {
        fprintf(stderr, "usage: wan CONTROL_FD NETNS_FILE NETNS_FILE DEVICE\n");
        return 2;
    }
    int socket = atoi(words[1]);
    /* Sleep to the nanosecond, not to the 50 microseconds that are usual. */
    prctl(PR_SET_TIMERSLACK, 1);
    /* A real line is no slower where the hosts at its ends have much to do. */
    setpriority(PRIO_PROCESS, 0, -10);
    int one = device_in(words[2], words[4]), other = device_in(words[3], words[4]);
    directions[0] = (struct direction){.in = one, .out = other};
    directions[1] = (struct direction){.in = other, .out = one};
    for (int way = 0; way < 2; way++) {
        directions[way].heap = malloc(HELD_PACKETS * sizeof(struct packet *));
        if (directions[way].heap == NULL)
            die("memory");
    }
    if (send(socket, "ready", 5, MSG_NOSIGNAL) != 5)
        die("control socket");
    nanoseconds asked = 0;
    for (;;) {
        nanoseconds time = now();
        if (time - asked > CONTROL_NS) {
            asked = time;
            if (!control(socket))
                return 0;
        }
        bool busy = work(&directions[0]);
        busy |= work(&directions[1]);
        if (busy)
            continue;
        struct pollfd files[] = {{one, POLLIN, 0}, {other, POLLIN, 0}, {socket, POLLIN, 0}};
        nanoseconds due = INT64_MAX;
        for (int way = 0; way < 2; way++)
            if (directions[way].held > 0 && directions[way].heap[0]->due < due)
                due = directions[way].heap[0]->due;
        nanoseconds rest = due == INT64_MAX ? 0 : due - now();
        struct timespec pause = {0, 0};
        if (rest > 0)
            pause = (struct timespec){rest / 1000000000, rest % 1000000000};
        if (ppoll(files, 3, due == INT64_MAX ? NULL : &pause, NULL) > 0 && files[2].revents)
            asked = 0;
    }
}
