//! Shapes of Cloudflare's own client for Node, against which requests and the answers here are checked.

use serde_json::Value;

fn shapes() -> Value {
    serde_json::from_str(include_str!("shapes.json")).expect("the fixture is JSON")
}

/// Says what of a body is not of the shape.
pub(crate) fn body(shape: &str, body: &Value) -> Vec<String> {
    let shapes = shapes();
    let shape = &shapes["bodies"][shape];
    let Some(fields) = body.as_object() else { return vec!["the body is no object".to_owned()] };
    let required = shape["required"].as_array().expect("a list").iter().filter_map(Value::as_str);
    let missing = required.filter(|name| !fields.contains_key(*name));
    let mut wrong: Vec<_> = missing.map(|name| format!("{name} is missing")).collect();
    for (name, value) in fields {
        let fits = match &shape["fields"][name] {
            Value::String(kind) => kind == kind_of(value),
            Value::Array(words) => words.contains(value),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => false,
        };
        if !fits {
            wrong.push(format!("{name} is {value}"));
        }
    }
    wrong
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Says which parts of a query are not of the shape.
pub(crate) fn query(shape: &str, query: &[(String, String)]) -> Vec<String> {
    let shapes = shapes();
    let known = shapes["queries"][shape].as_array().expect("a list");
    let unknown = query.iter().filter(|(name, _)| !known.iter().any(|known| known == name));
    unknown.map(|(name, _)| format!("the query has {name}")).collect()
}

/// Says which fields of an answer are not of the shape.
pub(crate) fn result(shape: &str, result: &Value) -> Vec<String> {
    let shapes = shapes();
    let known = shapes["results"][shape].as_array().expect("a list");
    let fields = result.as_object().expect("an object");
    let unknown = fields.keys().filter(|name| !known.iter().any(|known| known == *name));
    unknown.map(|name| format!("{shape} has no {name}")).collect()
}

#[test]
fn field_that_cloudflare_does_not_know_is_found() {
    let right = serde_json::json!({ "name": "x", "config_src": "local", "tunnel_secret": "s" });
    assert_eq!(body("CloudflaredCreateParams", &right), [""; 0]);
    let wrong = serde_json::json!({ "nam": "x", "config_src": "here" });
    assert_eq!(body("CloudflaredCreateParams", &wrong).len(), 3);
    assert_eq!(query("ZoneListParams", &[("nome".into(), "x".into())]).len(), 1);
    assert_eq!(result("TokenVerifyResponse", &serde_json::json!({ "state": 1 })).len(), 1);
}
