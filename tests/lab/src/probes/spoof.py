import socket, struct, sys, time
mac, ip, own, host, gateway = sys.argv[1:6]
mac, own, host = (bytes.fromhex(x.replace(":", "")) for x in (mac, own, host))
ip, gateway = socket.inet_aton(ip), socket.inet_aton(gateway)
every = b"\xff" * 6
def udp(source, target, sport, dport, body):
    part = struct.pack("!HHHH", sport, dport, 8 + len(body), 0) + body
    head = bytes([0x45, 0]) + struct.pack("!H", 20 + len(part)) + bytes([0, 0, 0, 0, 64, 17, 0, 0]) + source + target
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xffff) + (total >> 16)
    return head[:10] + struct.pack("!H", 0xffff ^ total) + head[12:] + part
def arp(kind, sender, target):
    return b"\x00\x01\x08\x00\x06\x04" + struct.pack("!H", kind) + own + sender + host + target
frames = {
    "arp": [host + own + b"\x08\x06" + arp(2, ip, gateway), every + own + b"\x08\x06" + arp(1, ip, ip)],
    "mac": [every + mac + b"\x88\xb5" + bytes(60), bytes.fromhex("0180c200000e") + mac + b"\x88\xcc" + bytes(60),
            bytes.fromhex("0180c2000003") + mac + b"\x88\x8e" + bytes(60)],
    "ip": [host + own + b"\x08\x00" + udp(ip, gateway, 4242, 4242, b"x")],
    "dhcp": [every + own + b"\x08\x00" + udp(gateway, b"\xff" * 4, 67, 68, bytes(300))],
    "lldp": [bytes.fromhex("0180c200000e") + own + b"\x08\x00" + udp(bytes(4), b"\xff" * 4, 4343, 4343, b"x")],
    "broadcast": [host + own + b"\x08\x00"
                  + udp(socket.inet_aton(sys.argv[7]), socket.inet_aton("203.0.113.255"), 4344, 4344, b"x")],
}[sys.argv[6]]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for _ in range(5):
    for frame in frames:
        s.send(frame)
        time.sleep(0.02)
