//! Query strings. Unknown and repeated parameters are faults, and are named.

use axum::extract::FromRequestParts;
use axum::http::Uri;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::kernel::Refusal;

/// A query string.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        parse_query(&parts.uri).map(Self)
    }
}

/// Parameters every read takes; a handler's own query need not name them.
const EVERYWHERE: &[&str] = &["min_index", "consistency"];

/// Reads a query into `T`. Unknown and repeated parameters are faults.
///
/// # Errors
/// 400 naming the parameter.
pub fn parse_query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Refusal> {
    let mut map = serde_json::Map::new();
    for (name, value) in pairs(uri.query().unwrap_or_default())? {
        if EVERYWHERE.contains(&name.as_str()) {
            continue;
        }
        // Numbers and booleans are read from their text; a field that wants a string gets its text back.
        if map.insert(name.clone(), serde_json::Value::String(value)).is_some() {
            return Err(Refusal::malformed(format!("?{name}"), format!("the parameter {name} is given twice")));
        }
    }
    serde_path_to_error::deserialize(QueryMap(map)).map_err(|e: serde_path_to_error::Error<serde_json::Error>| {
        let at = e.path().to_string();
        let text = e.inner().to_string();
        let told = text.strip_prefix("unknown field `").or_else(|| text.strip_prefix("missing field `"));
        let name = told.and_then(|t| t.split('`').next()).unwrap_or(&at);
        Refusal::malformed(format!("?{name}"), format!("the parameter {name}: {text}"))
    })
}

/// The pairs of a query string, percent-decoded, `+` for a space.
///
/// # Errors
/// 400 when they are not UTF-8.
pub fn pairs(query: &str) -> Result<Vec<(String, String)>, Refusal> {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8().map(|d| d.into_owned());
        decoded.map_err(|_| Refusal::malformed("?", "a parameter is not UTF-8"))
    };
    let parts = query.split('&').filter(|p| !p.is_empty());
    parts.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(n, v)| Ok((decode(n)?, decode(v)?))).collect()
}

/// A map of strings whose values also read as numbers and booleans.
struct QueryMap(serde_json::Map<String, serde_json::Value>);

impl<'de> serde::Deserializer<'de> for QueryMap {
    type Error = serde_json::Error;

    fn deserialize_any<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        let pairs = self.0.into_iter().map(|(k, v)| (k, Text(v.as_str().unwrap_or_default().to_owned())));
        visitor.visit_map(serde::de::value::MapDeserializer::new(pairs))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct Text(String);

impl serde::de::IntoDeserializer<'_, serde_json::Error> for Text {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! parsed {
    ($($method:ident $visit:ident $kind:ty, $wanted:literal;)*) => {$(
        fn $method<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            match self.0.parse::<$kind>() {
                Ok(value) => visitor.$visit(value),
                Err(_) => Err(serde::de::Error::custom(format!("{:?} is not {}", self.0, $wanted))),
            }
        }
    )*};
}

impl<'de> serde::Deserializer<'de> for Text {
    type Error = serde_json::Error;

    fn deserialize_any<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_string(self.0)
    }

    fn deserialize_option<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: serde::de::Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_enum(serde::de::IntoDeserializer::<Self::Error>::into_deserializer(self.0))
    }

    parsed! {
        deserialize_bool visit_bool bool, "true or false";
        deserialize_i64 visit_i64 i64, "a whole number";
        deserialize_i32 visit_i32 i32, "a whole number";
        deserialize_u64 visit_u64 u64, "a whole number";
        deserialize_u32 visit_u32 u32, "a whole number";
        deserialize_u16 visit_u16 u16, "a whole number";
        deserialize_f64 visit_f64 f64, "a number";
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i128 u8 u128 f32 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::super::optional::Nothing;
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Q {
        #[serde(default)]
        at: Option<i64>,
        #[serde(default)]
        prefix: Option<String>,
        #[serde(default)]
        keys_only: Option<bool>,
    }

    #[test]
    fn queries() {
        let q = |s: &str| parse_query::<Q>(&format!("/x?{s}").parse().unwrap());
        assert_eq!(
            q("at=3&prefix=a%2Fb+c&keys_only=true&min_index=4").unwrap(),
            Q { at: Some(3), prefix: Some("a/b c".into()), keys_only: Some(true) }
        );
        assert_eq!(q("prefix=12").unwrap().prefix.as_deref(), Some("12"));
        for (bad, name) in [("at=x", "?at"), ("att=1", "?att"), ("at=1&at=2", "?at"), ("keys_only=maybe", "?keys_only")]
        {
            let r = q(bad).unwrap_err();
            assert_eq!((r.problem().status, r.errors()[0].pointer.as_str()), (400, name));
        }
        assert_eq!(q("prefix=%ff").unwrap_err().problem().status, 400);
        let bare = |s: &str| parse_query::<Nothing>(&format!("/x?{s}").parse().unwrap()).map(|_| ());
        assert!(bare("").is_ok() && bare("min_index=3").is_ok());
        assert_eq!(bare("a=1").unwrap_err().errors()[0].pointer, "?a");
    }

    #[derive(Debug, Deserialize)]
    struct Needs {
        #[serde(rename = "lease")]
        _lease: i64,
    }

    #[test]
    fn what_is_missing_is_named() {
        let r = parse_query::<Needs>(&"/x".parse().unwrap()).unwrap_err();
        assert_eq!(r.errors()[0].pointer, "?lease");
    }
}
