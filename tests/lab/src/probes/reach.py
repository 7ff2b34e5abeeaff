import socket, sys, threading
found = {}
def reach(target):
    address, port = target.rsplit("/", 1)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(1.5)
    try:
        s.connect(socket.getaddrinfo(address, int(port), family, socket.SOCK_STREAM)[0][4])
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
