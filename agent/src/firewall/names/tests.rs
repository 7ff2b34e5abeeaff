use insta::assert_snapshot;
use proto::spec::Egress;

use super::{
    book::{ADDRESSES_MAX, Addresses, BYTES_MAX, Given},
    *,
};
use crate::firewall::{
    Entry,
    tests::{entry, rules},
};

fn listed(last: u8, names: &str) -> Entry {
    Entry { egress: names.parse::<Egress>().expect("an egress"), ..entry(last) }
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(93, 184, 216, last)
}

fn sandbox(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 100, 1, last)
}

fn grant(of: u8, name: &str, last: u8) -> Grant {
    Grant { sandbox: sandbox(of), name: name.to_owned(), address: ip(last) }
}

#[tokio::test(start_paused = true)]
async fn tables_of_a_sandbox_with_a_list() {
    let unknown = Entry { ip: None, ..listed(4, "allow=a.b") };
    let rules = rules([
        (100_002, entry(2)),
        (100_003, listed(3, "allow=*.npmjs.org,github.com")),
        (100_004, unknown),
    ]);
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&rules);
    book.grant(&[grant(3, "github.com", 34)], now);
    assert_snapshot!(whole(&rules, &book, &Kernel::default(), now));
}

#[tokio::test(start_paused = true)]
async fn change_of_a_list_names_only_what_differs() {
    let one = rules([(100_002, listed(2, "allow=a.b,c.d")), (100_003, listed(3, "allow=a.b"))]);
    let two = rules([(100_002, listed(2, "allow=a.b")), (100_003, listed(3, "allow=a.b"))]);
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&one);
    let grants = [grant(2, "a.b", 1), grant(2, "c.d", 2), grant(3, "a.b", 1)];
    assert_eq!(book.grant(&grants, now).add.len(), 3);
    assert_eq!(change(&one, &one, &book), "");
    book.follow(&two);
    assert_snapshot!(change(&one, &two, &book), @r#"
    delete element inet pve_sandbox_names listed { 10.100.1.2 }
    add element inet pve_sandbox_names listed { 10.100.1.2 comment "100002 2e7336dc8eba87ef" }
    add element bridge pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
    add element inet pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
    delete element bridge pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
    delete element inet pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
    "#);
    let open = rules([(100_002, entry(2))]);
    assert_eq!(change(&open, &open, &book), "");
    assert!(change(&open, &two, &book).contains("chain named"), "the first one makes the tables");
    let gone = change(&two, &open, &book);
    assert!(gone.contains("delete table inet") && !gone.contains("chain"), "{gone}");
}

#[tokio::test(start_paused = true)]
async fn tighter_list_takes_back_what_no_name_of_it_has() {
    let with =
        |names: &str| rules([(100_002, listed(2, names)), (100_003, listed(3, "allow=a.b"))]);
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&with("allow=a.b,c.d"));
    let grants = [
        grant(2, "a.b", 1),
        grant(2, "c.d", 1),
        grant(2, "c.d", 2),
        grant(2, "e.f", 3),
        grant(9, "a.b", 4),
        grant(3, "a.b", 2),
    ];
    let change = book.grant(&grants, now);
    let pairs = [(2, 1), (2, 2), (3, 2)].map(|(of, last)| (sandbox(of), ip(last)));
    assert_eq!((change.add, change.remove), (pairs.into(), [].into()), "as far as allowed");
    let refused = [(2, "e.f"), (9, "a.b")].map(|(of, name)| (sandbox(of), name.to_owned()));
    assert_eq!(change.refused, refused.into());
    assert_eq!(book.gone().len(), 0);
    book.follow(&with("allow=a.b"));
    assert_eq!(*book.gone(), [(sandbox(2), ip(2))].into(), "`a.b` has the other one");
    // Until it is known to be gone, it stays on the list of what must go.
    book.follow(&with("allow=a.b,c.d"));
    assert_eq!(book.gone().len(), 1);
    assert!(!book.alive(&Kernel::default(), now).contains_key(&(sandbox(2), ip(2))));
    book.remove(&book.gone().clone());
    assert_eq!((book.gone().len(), book.addresses(sandbox(2))), (0, vec![ip(1)]));
    // An answer gives it back.
    book.follow(&with("allow=a.b"));
    book.follow(&with("allow=c.d"));
    assert_eq!(*book.gone(), [(sandbox(2), ip(1))].into());
    book.grant(&[grant(2, "c.d", 1)], now);
    assert_eq!(book.gone().len(), 0);
    // Another sandbox with the address starts with nothing.
    book.follow(&rules([(100_009, listed(2, "allow=c.d"))]));
    assert_eq!(book.gone().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn addresses_of_a_sandbox_are_bounded() {
    let rules = rules([(100_002, listed(2, "allow=*.a.b")), (100_003, listed(3, "allow=*.a.b"))]);
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&rules);
    book.grant(&[grant(3, "x.a.b", 1)], now);
    for number in 0..2000_u32 {
        let address = Ipv4Addr::from(0x0800_0000 + number);
        let grant = Grant { sandbox: sandbox(2), name: "x.a.b".into(), address };
        let change = book.grant(&[grant], now);
        let oldest = number.checked_sub(512).map(|n| Ipv4Addr::from(0x0800_0000 + n));
        let removed: Vec<_> = change.remove.iter().map(|(_, address)| *address).collect();
        assert_eq!(removed, oldest.into_iter().collect::<Vec<_>>());
        book.remove(&change.remove);
    }
    assert_eq!(book.addresses(sandbox(2)).len(), ADDRESSES_MAX);
    assert_eq!(book.addresses(sandbox(3)), [ip(1)], "another's stay");
}

#[tokio::test(start_paused = true)]
async fn names_that_are_made_long_take_no_more_than_their_share() {
    let listed = |last: u8| (100_000 + u32::from(last), listed(last, "allow=*.a.b"));
    let rules = rules((1..=250).map(listed));
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&rules);
    book.grant(&[grant(1, "x.a.b", 1)], now);
    let long = |number: u32| {
        let label = format!("{number:0>60}");
        format!("{label}.{label}.{label}.a.b")
    };
    for number in 0..50_000_u32 {
        let (of, name) = (u8::try_from(2 + number % 240).expect("small"), long(number));
        let address = Ipv4Addr::from(0x0800_0000 + number);
        let change = book.grant(&[Grant { sandbox: sandbox(of), name, address }], now);
        assert!(!change.remove.contains(&(sandbox(of), address)), "the newest stays");
        book.remove(&change.remove);
        let bytes = |of: &Addresses| of.all.values().map(Given::bytes).sum::<usize>();
        if number % 5000 == 0 {
            assert!(book.given.values().all(|of| of.bytes == bytes(of)));
        }
    }
    let all: usize = book.given.values().map(|of| of.bytes).sum();
    assert!(all <= BYTES_MAX.1 && all > BYTES_MAX.1 * 9 / 10, "{all}");
    assert!(book.given.values().all(|of| of.bytes <= BYTES_MAX.0));
    assert_eq!(book.addresses(sandbox(1)), [ip(1)], "who has few keeps them");
}

#[tokio::test(start_paused = true)]
async fn next_agent_keeps_what_was_given_under_the_same_list() {
    let list = listed(2, "allow=a.b");
    let rules = rules([(100_002, list.clone()), (100_003, listed(3, "allow=a.b"))]);
    let text = digest(&(
        100_002_u32.try_into().expect("a vmid"),
        list.egress.list().expect("one").clone(),
    ));
    let listed = format!(
        r#"{{"nftables": [{{"metainfo": {{}}}}, {{"set": {{"name": "listed", "elem": [
        {{"elem": {{"val": "10.100.1.2", "comment": "{text}"}}}},
        {{"elem": {{"val": "10.100.1.3", "comment": "100003 0000000000000000"}}}}]}}}}]}}"#
    );
    let element = |of: u8, last: u8| {
        format!(
            r#"{{"elem": {{"val": {{"concat": ["10.100.1.{of}", "93.184.216.{last}"]}}, "timeout": 900, "expires": 80}}}}"#
        )
    };
    let allowed = format!(
        r#"{{"nftables": [{{"set": {{"name": "allowed", "elem": [{}, {}]}}}}]}}"#,
        element(2, 1),
        element(3, 1)
    );
    let kernel = Kernel::parse(&listed, &allowed);
    let (mut book, now) = (Book::default(), Instant::now());
    book.follow(&rules);
    book.recall(&kernel, now);
    let kept = Duration::from_secs(80);
    assert_eq!(book.alive(&kernel, now), [((sandbox(2), ip(1)), kept)].into());
    // Nobody knows its name any more, so the next list takes it back.
    book.follow(&rules_of("allow=a.b,c.d"));
    assert_eq!(*book.gone(), [(sandbox(2), ip(1))].into());
    assert_eq!(Kernel::parse("", "{"), Kernel::default());
}

fn rules_of(names: &str) -> Rules {
    rules([(100_002, listed(2, names))])
}
