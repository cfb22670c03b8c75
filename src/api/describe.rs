//! What the OpenAPI document says of all routes alike, and the rooms' lines therefore do not.

use std::collections::HashMap;

use axum::http::Method;
use utoipa::openapi::path::{Operation, ParameterIn, PathItem};
use utoipa::openapi::schema::{ArrayBuilder, Type};
use utoipa::openapi::{ContentBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder, Schema};

/// The name of the schema of refusals.
const PROBLEM: &str = "Problem";

/// The routes that take nothing in the query, and by which methods: what is there all the same is a mistake.
pub(super) type Plain = HashMap<String, Vec<Method>>;

/// Reads them off the document, where every parameter is that a handler reads.
pub(super) fn plain(document: &OpenApi) -> Plain {
    let mut plain = Plain::new();
    for (path, item) in document.paths.paths.iter().filter(|(path, _)| path.starts_with("/v1/")) {
        let PathItem { get, put, post, delete, head, patch, .. } = item;
        let all = [
            (Method::GET, get),
            (Method::PUT, put),
            (Method::POST, post),
            (Method::DELETE, delete),
            (Method::HEAD, head.as_ref().map_or(get, |_| head)),
            (Method::PATCH, patch),
        ];
        let methods = all.into_iter().filter(|(_, operation)| operation.as_ref().is_some_and(|o| !asks(o)));
        plain.insert(path.clone(), methods.map(|(method, _)| method).collect());
    }
    plain
}

fn asks(operation: &Operation) -> bool {
    let named = |p: &RefOr<utoipa::openapi::path::Parameter>| match p {
        RefOr::T(parameter) => parameter.parameter_in == ParameterIn::Query,
        RefOr::Ref(_) => true,
    };
    operation.parameters.iter().flatten().any(named)
}

/// Completes the document: every operation can be refused, and the rest of a path is a parameter like any.
pub(super) fn complete(document: &mut OpenApi) {
    document.components.get_or_insert_default().schemas.insert(PROBLEM.to_owned(), problem());
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| described(&path, item)).collect();
}

fn described(path: &str, mut item: PathItem) -> (String, PathItem) {
    let documented = path.starts_with("/v1/") || path.starts_with("/access/");
    for operation in operations(&mut item) {
        operation.responses.responses.entry("default".to_owned()).or_insert_with(|| refused(documented).into());
    }
    // The router marks the rest of a path with a star, which OpenAPI does not know.
    (path.replace("{*", "{"), item)
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, head, patch, .. } = item;
    [get, put, post, delete, head, patch].into_iter().flatten()
}

fn refused(documented: bool) -> Response {
    let response = ResponseBuilder::new();
    if !documented {
        return response.description("It is refused").build();
    }
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(PROBLEM))).build();
    response.description("It is refused (RFC 9457)").content("application/problem+json", content).build()
}

/// A problem document; further members say more of some problems.
fn problem() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let fault = ObjectBuilder::new()
        .property("pointer", text().description(Some("JSON Pointer into the body, or `?name` of a parameter")))
        .property("detail", text())
        .required("pointer")
        .required("detail");
    let problem = ObjectBuilder::new()
        .description(Some("Why it is refused (RFC 9457); further members say more of some problems"))
        .property("type", text().description(Some("`/problems/...`: a page about it")))
        .property("title", text())
        .property("status", ObjectBuilder::new().schema_type(Type::Integer))
        .property("detail", text())
        .property("instance", text())
        .property("errors", ArrayBuilder::new().items(fault));
    ["type", "title", "status", "detail"].into_iter().fold(problem, ObjectBuilder::required).into()
}
