//! `--debug`: a line on stderr for each call, with its name, its time and its result. Nothing that is
//! sent or received is shown, so no token either.

use std::{
    io::Write,
    pin::Pin,
    task::{Context, Poll},
};

use http_body_util::BodyExt;
use tokio::time::Instant;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    transport::{self, Channel},
};

/// Channel that can tell about the calls that go through it.
#[derive(Debug, Clone)]
pub struct Traced {
    channel: Channel,
    shown: bool,
}

impl Traced {
    /// Wraps a channel; tells about its calls if `shown`.
    pub fn new(channel: Channel, shown: bool) -> Self {
        Self { channel, shown }
    }
}

impl Service<http::Request<Body>> for Traced {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let call = self.shown.then(|| Call::begin(request.uri().path()));
        let answer = self.channel.call(request);
        Box::pin(async move {
            let Some(mut call) = call else { return answer.await };
            let response = answer.await.inspect_err(|_| call.end(Code::Unavailable))?;
            // A call that is refused at once has its status in the headers, others in the trailers.
            if let Some(status) = Status::from_header_map(response.headers()) {
                call.end(status.code());
                return Ok(response);
            }
            Ok(response.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status {
                        call.end(status.code());
                    }
                    frame
                }))
            }))
        })
    }
}

/// Call that is under way.
#[derive(Debug)]
struct Call {
    name: String,
    since: Instant,
    ended: bool,
}

impl Call {
    fn begin(path: &str) -> Self {
        let name = path.trim_start_matches('/').to_owned();
        Self { name, since: Instant::now(), ended: false }
    }

    fn end(&mut self, code: Code) {
        self.tell(&code_name(code));
    }

    fn tell(&mut self, result: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let ms = self.since.elapsed().as_secs_f64() * 1000.0;
        say(&format!("{} {ms:.1} ms {result}", self.name));
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // We hung up, or the connection broke.
        self.tell("no result");
    }
}

/// Prints a line for whoever looks for an error.
pub fn say(text: &str) {
    // A closed stderr cannot be reported. One write, so that lines do not mix.
    std::io::stderr().write_all(format!("debug: {text}\n").as_bytes()).ok();
}

/// Name of a code as the gRPC documents write it, such as `NOT_FOUND`.
fn code_name(code: Code) -> String {
    if code == Code::Ok {
        return "OK".to_owned();
    }
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_their_usual_names() {
        for (code, name) in [
            (Code::Ok, "OK"),
            (Code::NotFound, "NOT_FOUND"),
            (Code::Unauthenticated, "UNAUTHENTICATED"),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ] {
            assert_eq!(code_name(code), name);
        }
    }
}
