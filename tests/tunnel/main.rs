//! The tunnel: `setup`, `teardown`, the agent's upkeep and `doctor`, with a server that plays Cloudflare's API and checks
//! each request, and with cloudflared or its stand-in.

mod cloud;
mod controller;
mod doctor;
mod documents;
mod earlier;
mod faults;
mod keep;
mod nodes;
#[path = "../join/served.rs"]
mod served;
mod setup;
mod shapes;
mod teardown;
mod token;
mod variables;
mod world;
