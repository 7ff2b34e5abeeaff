import socket, sys, threading
found = {}
def reach(target):
    address, port = target.removeprefix("udp:").rsplit("/", 1)
    kind = socket.SOCK_DGRAM if target.startswith("udp:") else socket.SOCK_STREAM
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, kind)
    s.settimeout(1.5)
    try:
        s.connect(socket.getaddrinfo(address, int(port), family, kind)[0][4])
        if kind == socket.SOCK_DGRAM:
            s.send(b"x")
            s.recv(1)
        found[target] = "yes"
    except ConnectionRefusedError:
        found[target] = "yes"
    except OSError:
        found[target] = "no"
all = [threading.Thread(target=reach, args=(t,)) for t in sys.argv[1:]]
[t.start() for t in all]
[t.join() for t in all]
for target, word in found.items():
    print(target, word)
