use super::*;

#[test]
fn token_goes_only_to_https_or_to_this_machine_and_is_never_shown() {
    let token = Secret::from("canary-token");
    let ca = tempfile::NamedTempFile::new().expect("a file");
    let issued = rcgen::generate_simple_self_signed(vec!["x.test".into()]).expect("made");
    std::fs::write(ca.path(), issued.cert.pem()).expect("written");
    let new = |base: &str, token: &Secret<String>| Api::new(base, token, Some(ca.path()));
    for good in [BASE, "http://127.0.0.1:1/v4/", "http://localhost:1"] {
        let api = new(good, &token).expect(good);
        assert!(!format!("{api:?}").contains("canary"), "{api:?}");
    }
    for bad in ["http://api.cloudflare.com", "ftp://127.0.0.1", "x", "http://127.0.0.1.evil.test"] {
        assert!(matches!(new(bad, &token), Err(Error::Base(_))), "{bad}");
    }
    for bad in ["", "  \n", "two words", "line\nline", "t\u{e9}", &"x".repeat(300)] {
        assert!(matches!(new(BASE, &bad.into()), Err(Error::TokenForm)), "{bad:?}");
    }
    new(BASE, &" canary-token\n".into()).expect("a file ends with a line break");
}

#[test]
fn last_page_is_known_by_whatever_the_answer_tells() {
    let page = |total_pages, total_count, per_page, count| {
        Some(Page { page: 0, per_page, count, total_count, total_pages })
    };
    assert!(is_last(1, 50, None));
    assert!(!is_last(1, 50, page(2, 0, 0, 0)) && is_last(2, 1, page(2, 0, 0, 0)));
    assert!(!is_last(1, 20, page(0, 21, 20, 20)) && is_last(2, 1, page(0, 21, 20, 1)));
    assert!(is_last(1, 3, page(0, 0, 20, 3)) && !is_last(1, 20, page(0, 0, 20, 20)));
    assert!(is_last(3, 0, page(0, 0, 20, 20)), "an empty page");
}

#[test]
fn texts_become_parts_of_an_address() {
    assert_eq!(encoded("*.a-b.example.com"), "%2A.a-b.example.com");
    assert_eq!(encoded("a/b?c&d e"), "a%2Fb%3Fc%26d%20e");
    let headers = |value: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(value));
        headers
    };
    assert_eq!(retry_after(&headers("3")), Some(Duration::from_secs(3)));
    assert_eq!(retry_after(&headers("soon")), None);
    assert_eq!(retry_after(&HeaderMap::new()), None);
}

#[test]
fn refusal_is_told_in_cloudflares_words_and_without_control_characters() {
    let problems =
        vec![model::Problem { code: 1013, message: "You already\u{1b}[2J have it".into() }];
    let error = Error::Refused { call: "POST /x".into(), status: 409, problems };
    assert!(error.is_name_taken() && !error.is_record_taken() && !error.is_missing());
    let text = error.to_string();
    assert_eq!(text, "POST /x: Cloudflare refused it (409): You already[2J have it (1013)");
    let problems =
        vec![model::Problem { code: 9109, message: "not from\u{1b}[2J 192.0.2.9".into() }];
    let told = ": not from[2J 192.0.2.9 (9109)";
    let (permission, call) = (Permission::DnsEdit, "GET /x".to_owned());
    let lacks = Error::Lacks { permission, call, problems: problems.clone() }.to_string();
    assert!(lacks.contains("Zone > DNS > Edit"), "{lacks}");
    assert!(lacks.ends_with(&format!("(GET /x{told})")), "{lacks}");
    let token = Error::Token { state: "unknown".into(), problems }.to_string();
    assert!(token.contains(&format!("it is unknown{told}; make another")), "{token}");
}

#[test]
fn token_is_unknown_only_where_cloudflare_says_so() {
    let answer = |status: u16, body: &'static str| Answer {
        status: StatusCode::from_u16(status).expect("a status"),
        headers: HeaderMap::new(),
        body: Bytes::from_static(body.as_bytes()),
        is_whole: true,
    };
    let active = r#"{"success":true,"errors":[],"result":{"status":"active"}}"#;
    assert_eq!(verified(&answer(200, active)), Verified::State("active".into()));
    let unknown = r#"{"success":false,"errors":[{"code":1000,"message":"Invalid API Token"}]}"#;
    for (status, body) in [(401, unknown), (403, unknown), (401, "a page")] {
        assert_eq!(verified(&answer(status, body)), Verified::Unknown, "{status} {body}");
    }
    let elsewhere = r#"{"success":false,"errors":[{"code":9109,"message":"not from here"}]}"#;
    for (status, body) in [(403, elsewhere), (403, "a page"), (500, "a page"), (200, "{}")] {
        assert_eq!(verified(&answer(status, body)), Verified::NotTold, "{status} {body}");
    }
}
